// The instantiations of the GroupNorm + SiLU kernels in this build.
#include "ltxkern/group_norm_silu.cuh"
#include "ltxkern/group_norm_silu_channels_last.cuh"
#include "ltxkern/group_norm_silu_columns.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::group_norm_finalize)

#define FOR_TYPE_AND_VECTOR(T, V) \
    LTXK_KERNEL(ltxk::group_norm_stats<T, V>) \
    LTXK_KERNEL(ltxk::group_norm_apply<T, V>) \
    LTXK_KERNEL(ltxk::group_norm_stats_columns<T, V>) \
    LTXK_KERNEL(ltxk::group_norm_apply_columns<T, V>)

FOR_TYPE_AND_VECTOR(float, 4)
FOR_TYPE_AND_VECTOR(float, 1)
FOR_TYPE_AND_VECTOR(ltxk::f16, 8)
FOR_TYPE_AND_VECTOR(ltxk::f16, 1)
FOR_TYPE_AND_VECTOR(ltxk::bf16, 8)
FOR_TYPE_AND_VECTOR(ltxk::bf16, 1)

LTXK_KERNEL(ltxk::group_norm_columns<float, 4>)
LTXK_KERNEL(ltxk::group_norm_columns<ltxk::f16, 8>)
LTXK_KERNEL(ltxk::group_norm_columns<ltxk::bf16, 8>)
