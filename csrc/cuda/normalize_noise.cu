// The instantiations of the noise kernels in this build.
#include "ltxkern/normalize_noise.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::noise_statistics)
LTXK_KERNEL(ltxk::noise_measure<4>)
LTXK_KERNEL(ltxk::noise_measure<1>)
LTXK_KERNEL(ltxk::noise_apply<4>)
LTXK_KERNEL(ltxk::noise_apply<1>)
