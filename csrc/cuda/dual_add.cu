// The instantiations of the dual_add kernel in this build.
#include "ltxkern/dual_add.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::dual_add<float, 4>)
LTXK_KERNEL(ltxk::dual_add<float, 1>)
LTXK_KERNEL(ltxk::dual_add<ltxk::f16, 8>)
LTXK_KERNEL(ltxk::dual_add<ltxk::f16, 1>)
LTXK_KERNEL(ltxk::dual_add<ltxk::bf16, 8>)
LTXK_KERNEL(ltxk::dual_add<ltxk::bf16, 1>)
LTXK_KERNEL(ltxk::dual_add<double, 2>)
LTXK_KERNEL(ltxk::dual_add<double, 1>)
