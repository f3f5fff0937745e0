// The instantiations of the res2s kernels in this build: compute dtype x elements of a thread.
#include "ltxkern/res2s.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::res2s_midpoint<double, 4>)
LTXK_KERNEL(ltxk::res2s_midpoint<double, 1>)
LTXK_KERNEL(ltxk::res2s_midpoint<float, 4>)
LTXK_KERNEL(ltxk::res2s_midpoint<float, 1>)
LTXK_KERNEL(ltxk::res2s_advance<double, 4>)
LTXK_KERNEL(ltxk::res2s_advance<double, 1>)
LTXK_KERNEL(ltxk::res2s_advance<float, 4>)
LTXK_KERNEL(ltxk::res2s_advance<float, 1>)
LTXK_KERNEL(ltxk::res2s_sde_step<double, 4>)
LTXK_KERNEL(ltxk::res2s_sde_step<double, 1>)
LTXK_KERNEL(ltxk::res2s_sde_step<float, 4>)
LTXK_KERNEL(ltxk::res2s_sde_step<float, 1>)
