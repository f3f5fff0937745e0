// The instantiation of the LoRA merge kernel in this build; dtypes are looked at when it runs.
#include "ltxkern/merge_lora.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::merge_lora)
