// The instantiations of the rms_norm_modulate kernel in this build: elements of a thread's access.
#include "ltxkern/rms_norm_modulate.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::rms_norm_modulate_rows<8>)
LTXK_KERNEL(ltxk::rms_norm_modulate_rows<4>)
LTXK_KERNEL(ltxk::rms_norm_modulate_rows<1>)
