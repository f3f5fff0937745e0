// The instantiations of the LoRA switch in this build.
#include "ltxkern/switch_lora.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::switch_lora<ltxk::f16>)
LTXK_KERNEL(ltxk::switch_lora<ltxk::bf16>)
