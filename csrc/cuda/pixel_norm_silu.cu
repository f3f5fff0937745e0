// The instantiations of the PixelNorm + SiLU kernels in this build.
#include "ltxkern/pixel_norm_silu.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::pixel_norm_rows<float, 4>)
LTXK_KERNEL(ltxk::pixel_norm_rows<float, 1>)
LTXK_KERNEL(ltxk::pixel_norm_rows<ltxk::f16, 8>)
LTXK_KERNEL(ltxk::pixel_norm_rows<ltxk::f16, 1>)
LTXK_KERNEL(ltxk::pixel_norm_rows<ltxk::bf16, 8>)
LTXK_KERNEL(ltxk::pixel_norm_rows<ltxk::bf16, 1>)

LTXK_KERNEL(ltxk::pixel_norm_columns<float, 4, 8>)
LTXK_KERNEL(ltxk::pixel_norm_columns<float, 1, 4>)
LTXK_KERNEL(ltxk::pixel_norm_columns<ltxk::f16, 8, 4>)
LTXK_KERNEL(ltxk::pixel_norm_columns<ltxk::f16, 1, 4>)
LTXK_KERNEL(ltxk::pixel_norm_columns<ltxk::bf16, 8, 4>)
LTXK_KERNEL(ltxk::pixel_norm_columns<ltxk::bf16, 1, 4>)
