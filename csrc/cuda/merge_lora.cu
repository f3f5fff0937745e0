// The instantiations of the LoRA merge kernels in this build; the weight's dtype is looked at when they run.
#include "ltxkern/merge_lora_tensor_cores.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::merge_lora)
LTXK_KERNEL(ltxk::merge_lora_tensor_cores<ltxk::f16, false>)
LTXK_KERNEL(ltxk::merge_lora_tensor_cores<ltxk::f16, true>)
LTXK_KERNEL(ltxk::merge_lora_tensor_cores<ltxk::bf16, false>)
LTXK_KERNEL(ltxk::merge_lora_tensor_cores<ltxk::bf16, true>)
