// The instantiations of the qk_norm_rope kernels in this build: elements of a thread's access, or dtypes and the axes of the tables.
#include "ltxkern/qk_norm_rope.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::qk_norm_rope<4>)
LTXK_KERNEL(ltxk::qk_norm_rope<1>)

LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::bf16, ltxk::bf16, 0>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::bf16, float, 0>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::bf16, float, 1>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::bf16, float, 3>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::f16, ltxk::f16, 0>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::f16, float, 0>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::f16, float, 1>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<ltxk::f16, float, 3>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<float, float, 0>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<float, float, 1>)
LTXK_KERNEL(ltxk::qk_norm_rope_packs<float, float, 3>)
