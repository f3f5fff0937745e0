"""Run inside a fresh environment that a release archive was installed in: prints as JSON what the package is and does there.

python -I probe.py
"""

import json
import sys

import torch

import ltxkern
from ltxkern.compiled import extension, nvrtc
from ltxkern.dispatch import unavailable
from ltxkern.trust.permitted import BACKENDS


def greatest_error(device: str, backend: str) -> float:
    """Of group_norm_silu against its own torch reference in fp64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 5, 7, generator=generator)
    weight, bias = torch.randn(2, 12, generator=generator)
    with ltxkern.use_backend(backend):
        ours = ltxkern.group_norm_silu(x.to(device), weight.to(device), bias.to(device), 4).cpu()
    exact = ltxkern.reference.group_norm_silu(x.double(), weight.double(), bias.double(), 4)
    return float((ours.double() - exact).abs().max())


def main() -> None:
    """Print the facts."""
    reasons = {name: unavailable(name) for name in BACKENDS}
    tiers = {"torch": "cpu", "cpu": "cpu", "cuda": "cuda"}
    facts = {
        "file": ltxkern.__file__,
        "version": ltxkern.__version__,
        "torch": torch.__version__,
        "headers": str(nvrtc.include_directory()),
        "reasons": reasons,
        "without_cpu": [op for op, row in ltxkern.capabilities().items() if row["cpu"] is not None],
        "kernels": list(extension.module().kernels()) if reasons["cpu"] is None else [],
        "errors": {name: greatest_error(device, name) for name, device in tiers.items() if reasons[name] is None},
        "imported": [name for name in ("triton", "cupy", "diffusers", "transformers") if name in sys.modules],
    }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
