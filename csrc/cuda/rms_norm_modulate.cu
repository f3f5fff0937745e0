// The instantiations of the rms_norm_modulate kernels in this build: elements of a thread's access; dtypes, and whether a gated residual
// comes first.
#include "ltxkern/rms_norm_modulate.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::rms_norm_modulate_rows<4>)
LTXK_KERNEL(ltxk::rms_norm_modulate_rows<1>)

LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::bf16, ltxk::bf16, false>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::bf16, ltxk::bf16, true>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::bf16, float, false>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::bf16, float, true>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::f16, ltxk::f16, false>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::f16, ltxk::f16, true>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::f16, float, false>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<ltxk::f16, float, true>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<float, float, false>)
LTXK_KERNEL(ltxk::rms_norm_modulate_packs<float, float, true>)
