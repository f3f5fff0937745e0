// The instantiations of the guidance kernels in this build.
#include "ltxkern/combine_guidance.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::guidance_measure<float, 1>)
LTXK_KERNEL(ltxk::guidance_measure<double, 4>)
LTXK_KERNEL(ltxk::guidance_measure<double, 1>)
LTXK_KERNEL(ltxk::guidance_apply<float, 1>)
LTXK_KERNEL(ltxk::guidance_apply<double, 4>)
LTXK_KERNEL(ltxk::guidance_apply<double, 1>)
LTXK_KERNEL(ltxk::guidance_measure_packs<ltxk::bf16>)
LTXK_KERNEL(ltxk::guidance_measure_packs<ltxk::f16>)
LTXK_KERNEL(ltxk::guidance_measure_packs<float>)
LTXK_KERNEL(ltxk::guidance_apply_packs<ltxk::bf16>)
LTXK_KERNEL(ltxk::guidance_apply_packs<ltxk::f16>)
LTXK_KERNEL(ltxk::guidance_apply_packs<float>)
