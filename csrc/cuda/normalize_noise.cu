// The instantiations of the noise kernels in this build.
#include "ltxkern/normalize_noise.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::noise_statistics)
LTXK_KERNEL(ltxk::noise_measure<4>)
LTXK_KERNEL(ltxk::noise_measure<1>)
LTXK_KERNEL(ltxk::noise_apply<4>)
LTXK_KERNEL(ltxk::noise_apply<1>)
LTXK_KERNEL(ltxk::noise_single<4, 32>)
LTXK_KERNEL(ltxk::noise_single<4, 16>)
LTXK_KERNEL(ltxk::noise_single<2, 16>)
LTXK_KERNEL(ltxk::noise_single<1, 16>)
