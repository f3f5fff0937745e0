"""How far fp32 products of the transformer are from fp64, by oneDNN and by torch: of one product, and of a whole forward.

`python bench/product_errors.py` writes results/counted/product-errors.json. Distances over the norm of what is exact; of a product
also the largest one over the largest number. Of a forward diffusers' in fp64 is taken to be exact, with its fp32 timestep angles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench_dit
import machine
from ltxkern.patching import products
from ltxkern.pipeline.model.transformer import predict_velocity

RESULTS = Path(__file__).parent / "results" / "counted" / "product-errors.json"
# Rows, inner and outer width.
PRODUCTS = (
    (1, 4096, 4096),
    (64, 4096, 8192),
    (126, 2048, 2048),
    (256, 4096, 4096),
    (256, 16384, 4096),
    (512, 4096, 16384),
)
FORWARDS = (("wide256", 1), ("wide512", 2))
LARGEST_OF = 64  # rows of which the largest error is taken: fp64 is slow


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """Within it the transformer's fp32 products are oneDNN's or torch's."""
    with torch.backends.mkldnn.flags(enabled=name == "oneDNN"):
        yield


def of_product(rows: int, inner: int, outer: int) -> dict[str, Any]:
    """Both libraries on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(inner, outer)
    torch.nn.init.normal_(layer.weight, std=inner**-0.5, generator=generator)
    torch.nn.init.normal_(layer.bias, generator=generator)
    x = torch.randn(rows, inner, generator=generator)
    some = slice(0, LARGEST_OF)
    exact = x[some].double() @ layer.weight.double().T + layer.bias.double()
    made: dict[str, Any] = {"rows": rows, "inner": inner, "outer": outer}
    for name in ("oneDNN", "torch"):
        with library(name):
            apart = products.linear(layer, x)[some].double() - exact
        made[name] = {
            "rms": float(apart.norm() / exact.norm()),
            "largest": float(apart.abs().max() / exact.abs().max()),
        }
    return made


def _wide(value: Any) -> Any:
    """A modality's input in fp64, positions aside."""
    changed = {
        field.name: given.double()
        for field in dataclasses.fields(value)
        if field.name != "positions" and isinstance(given := getattr(value, field.name), Tensor)
        if given.is_floating_point()
    }
    return dataclasses.replace(value, **changed)


def of_forward(name: str, blocks: int) -> dict[str, Any]:
    """Velocities of video and sound."""
    (case,) = (case for case in bench_dit.CASES if case.name == name)
    ours, theirs = bench_dit.build(case, blocks, torch.float32, torch.device("cpu"))
    inputs = bench_dit.inputs_of(case, ours, torch.float32, torch.device("cpu"))
    found = {"diffusers": bench_dit.diffusers_forward(theirs, inputs)()}
    for each in ("oneDNN", "torch"):
        with library(each):
            found[each] = predict_velocity(ours, inputs.video, inputs.audio)
    wide = bench_dit.Inputs(_wide(inputs.video), _wide(inputs.audio))
    exact = bench_dit.diffusers_forward(theirs.double(), wide)()

    def apart(velocities: Sequence[Tensor]) -> list[float]:
        return [float((one - true).norm() / true.norm()) for one, true in zip(velocities, exact, strict=True)]

    return {"case": name, "blocks": blocks, **{each: apart(velocities) for each, velocities in found.items()}}


@torch.no_grad()
def main() -> int:
    """Command line."""
    if not products.onednn_quicker():
        print("fp32 products are torch's on this processor: there is nothing to compare", file=sys.stderr)
        return 1
    made = {
        "definition": __doc__,
        "machine": machine.describe(torch.device("cpu"), torch.get_num_threads()),
        "products": [of_product(*each) for each in PRODUCTS],
        "forwards": [of_forward(*each) for each in FORWARDS],
    }
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps({name: made[name] for name in ("products", "forwards")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
