// The instantiations of the qk_norm_rope kernel in this build: elements of a thread's access.
#include "ltxkern/qk_norm_rope.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::qk_norm_rope<8>)
LTXK_KERNEL(ltxk::qk_norm_rope<4>)
LTXK_KERNEL(ltxk::qk_norm_rope<1>)
