"""Every CPU kernel in each instruction set that this processor has: rows around a register, misaligned, with odd ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ltxkern.compiled import extension

ROOT = Path(__file__).resolve().parents[2]

COMPARE = """
import torch, ltxkern
from ltxkern.compiled import extension
from ltxkern import res2s_steps
from tests.ops.contract import noise, poisoned

STEP = res2s_steps([0.9, 0.7])[0]

def misaligned(value, by):
    # The same values, `by` elements behind an aligned address.
    memory = value.new_empty(value.numel() + by)
    return memory[by:].view(value.shape).copy_(value)

def calls(width, dtype):
    shapes = {"x": (2, 5, width), "y": (2, 5, width), "row": (2, 1, width), "vector": (width,), "column": (2, 5, 1)}
    x, y, row, vector, column = (
        misaligned(noise(*shape, dtype=dtype, seed=seed), seed) for seed, shape in enumerate(shapes.values())
    )
    clean, mask = noise(2, 5, width, seed=5), noise(2, 5, 1, seed=6).sigmoid()
    noises = [noise(2, 5, width, dtype=torch.float64, seed=seed) for seed in (7, 8)]
    stats = ltxkern.noise_statistics(noises[0])
    yield "rms_norm_modulate", (x, row, y), {"weight": vector}, 1
    yield "rms_norm_modulate", (x, row.float(), vector), {}, 1
    yield "gated_residual_rms_norm_modulate", (x, y, row, row.float(), vector), {}, 2
    for gate in (row, vector, column, y.float()):
        yield "gated_residual", (x, y, gate), {}, 1
    table, index = misaligned(noise(3, width, dtype=dtype, seed=11), 1), torch.arange(10).remainder(3).view(2, 5)
    yield "rms_norm_modulate", (x, table, table), {"rows": index}, 1
    yield "gated_residual_rms_norm_modulate", (x, y, table, table, table), {"rows": index.int()}, 2
    yield "gated_residual", (x, y, table), {"rows": index}, 1
    yield "head_gate", (x, column[..., 0]), {}, 1
    yield "dual_add", (x, y, x * y), {}, 2
    # An odd number of elements, of several blocks of registers.
    flat = [value.flatten()[:-1] for value in (x, y, x - y)]
    yield "dual_add", flat, {}, 2
    for name in ("normalize_noise", "channelwise_normalize"):
        yield name, (x,), {}, 1
    yield "combine_guidance", (x, y, x * y, None), {"cfg_scale": 3.0, "stg_scale": 1.0, "rescale_scale": 0.5}, 0
    yield "res2s_sde_step", (x, y, 0.9, 0.7, noises[0]), {"noise_stats": stats}, 1
    for compute in (torch.float32, torch.float64):
        given = {"mask": mask, "clean": clean, "noise_stats": stats, "compute_dtype": compute}
        yield "res2s_midpoint", (x, y, noises[0], STEP), given, 0
        yield "res2s_midpoint", (x, y, noises[1], STEP), {"compute_dtype": compute}, 0
        given = {"mask": mask, "clean": clean, "noise_stats": stats}
        yield "res2s_advance", (x.to(compute), x, y, noises[0], STEP), given, 0
    for heads, layout in ((1, "split"), (3, "split"), (1, "interleaved"), (3, "interleaved")):
        q, k, weight = x.repeat(1, 1, 2 * heads), y.repeat(1, 1, 2 * heads), vector.repeat(2 * heads)
        for table in (dtype, torch.float32):
            cos, sin = (noise(2, heads, 5, width, dtype=table, seed=seed) for seed in (9, 10))
            yield "qk_norm_rope", (q, k, weight, weight, cos, sin), {"layout": layout}, 2

def listed(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for width in (1, 7, 33, 261):
        for name, arguments, options, outputs in calls(width, dtype):
            op = getattr(ltxkern, name)
            with ltxkern.use_backend("torch"):
                wanted = listed(op(*arguments, **options))
            if outputs:
                targets = [misaligned(poisoned(value), 3) for value in wanted]
                options = options | {"out": targets[0] if outputs == 1 else tuple(targets)}
            with ltxkern.use_backend("cpu"):
                ours = listed(op(*arguments, **options))
            for one, other in zip(ours, wanted):
                # Roundings of the compute dtype, one of the result's, and one of each step of a composition in the given dtype.
                eps = max(torch.finfo(one.dtype).eps, torch.finfo(dtype).eps)
                near = dict(rtol=4 * eps, atol=8 * eps * max(1.0, float(other.abs().max())))
                say = lambda text: f"{name} {dtype} width {width}: {text}"
                torch.testing.assert_close(one, other, msg=say, **near)
print(extension.module().isa())
"""


@pytest.mark.skipif(
    extension.unavailable("cpu") is not None, reason=f"CPU KERNELS NOT TESTED: {extension.unavailable('cpu')}"
)
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_op(isa: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LTXKERN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "this processor has no" in done.stderr:
        pytest.skip(f"{isa} OBJECTS NOT TESTED: this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == isa
