// The instantiations of the qk_norm_rope kernels in this build: elements of a thread's access, or dtypes.
#include "ltxkern/qk_norm_rope.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::qk_norm_rope<4>)
LTXK_KERNEL(ltxk::qk_norm_rope<1>)

LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::bf16, ltxk::bf16>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::bf16, float>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::f16, ltxk::f16>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::f16, float>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<float, float>)
