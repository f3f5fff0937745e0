"""Every op's suite, in the order of the report."""

from __future__ import annotations

import bench_combine_guidance
import bench_dual_add
import bench_gated_residual
import bench_group_norm_silu
import bench_merge_lora
import bench_normalize_noise
import bench_pixel_norm_silu
import bench_qk_norm_rope
import bench_res2s
import bench_rms_norm_modulate

SUITES = (
    bench_group_norm_silu.SUITE,
    bench_pixel_norm_silu.SUITE,
    bench_rms_norm_modulate.SUITE,
    bench_gated_residual.SUITE,
    bench_qk_norm_rope.SUITE,
    bench_res2s.SUITE,
    bench_normalize_noise.SUITE,
    bench_combine_guidance.SUITE,
    bench_merge_lora.SUITE,
    bench_dual_add.SUITE,
)
