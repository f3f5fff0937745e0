// The instantiations of the gated_residual kernel in this build: elements of a thread's access.
#include "ltxkern/gated_residual.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::gated_residual_rows<8>)
LTXK_KERNEL(ltxk::gated_residual_rows<4>)
LTXK_KERNEL(ltxk::gated_residual_rows<1>)
