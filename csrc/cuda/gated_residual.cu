// The instantiations of the gated_residual kernels in this build: elements of a thread's access, or dtypes.
#include "ltxkern/gated_residual.cuh"
#include "registry.h"

LTXK_KERNEL(ltxk::gated_residual_rows<4>)
LTXK_KERNEL(ltxk::gated_residual_rows<1>)

LTXK_KERNEL(ltxk::gated_residual_packs<ltxk::bf16, ltxk::bf16>)
LTXK_KERNEL(ltxk::gated_residual_packs<ltxk::bf16, float>)
LTXK_KERNEL(ltxk::gated_residual_packs<ltxk::f16, ltxk::f16>)
LTXK_KERNEL(ltxk::gated_residual_packs<ltxk::f16, float>)
LTXK_KERNEL(ltxk::gated_residual_packs<float, float>)
LTXK_KERNEL(ltxk::head_gate_packs<ltxk::bf16, ltxk::bf16>)
LTXK_KERNEL(ltxk::head_gate_packs<ltxk::bf16, float>)
LTXK_KERNEL(ltxk::head_gate_packs<ltxk::f16, ltxk::f16>)
LTXK_KERNEL(ltxk::head_gate_packs<ltxk::f16, float>)
LTXK_KERNEL(ltxk::head_gate_packs<float, float>)
