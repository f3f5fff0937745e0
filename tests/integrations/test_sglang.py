"""`integrations.sglang.install` on a package with sglang's module names and signatures, and torch in the place of its kernels."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ltxkern
from ltxkern.integrations import sglang

SOURCES = {
    "group_norm_silu": """
def apply_group_norm_silu(x, norm, activation):
    return activation(norm(x)), "theirs"
""",
    "residual_gate_add": """
def can_use_residual_gate_add_cuda(residual, update, gate):
    return False

def residual_gate_add_cuda(residual, update, gate):
    return "theirs"
""",
    "triton/ltx2_qknorm": """
def ltx2_qknorm_split_rope_pair(q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps):
    return "theirs"
""",
    "cutedsl/scale_residual_norm_scale_shift": """
def fused_norm_scale_shift(x, weight, bias, scale, shift, norm_type, eps=1e-5):
    return "theirs"

def fused_scale_residual_norm_scale_shift(residual, x, gate, weight, bias, scale, shift, norm_type, eps=1e-5):
    return "theirs"
""",
}
# A model that took two functions by name before `install`, one under another name.
MODEL = """
from sglang.jit_kernel.diffusion.group_norm_silu import apply_group_norm_silu
from sglang.jit_kernel.diffusion.residual_gate_add import residual_gate_add_cuda as gate_add
"""
HOME = "sglang.jit_kernel.diffusion"
# The same functions where sglang 0.5.23 has them, behind a package that hands them out by name and keeps what it handed out.
NOW = {
    "ops/diffusion/norm/group_norm_silu": SOURCES["group_norm_silu"],
    "ops/diffusion/norm/scale_residual_norm_cutedsl": SOURCES["cutedsl/scale_residual_norm_scale_shift"],
    "kda_kernels/residual_gate_add_jit": SOURCES["residual_gate_add"]
    + """
def residual_gate_add(residual, update, gate):
    return "theirs"
""",
    "kda_kernels/ltx2_qknorm_split_rope_jit": """
def can_use_ltx2_qknorm_split_rope_cuda(
    q, q_cos, q_sin, q_weight, k, k_cos, k_sin, k_weight, *, num_heads, head_dim, allow_sm90=False
):
    return False

def ltx2_qknorm_split_rope_cuda(
    q, q_cos, q_sin, q_weight, k, k_cos, k_sin, k_weight, *, eps, num_heads, head_dim, allow_sm90=False
):
    return "theirs"
""",
}
FACADE = """
from importlib import import_module

HOMES = ("ops.diffusion.norm.group_norm_silu", "ops.diffusion.norm.scale_residual_norm_cutedsl",
         "kda_kernels.residual_gate_add_jit", "kda_kernels.ltx2_qknorm_split_rope_jit")

def __getattr__(name):
    for home in HOMES:
        module = vars(import_module("sglang.kernels." + home))
        if not name.startswith("__") and name in module:
            globals()[name] = module[name]
            return module[name]
    raise AttributeError(name)
"""


def _write(root: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@contextmanager
def package(folder: Path) -> Iterator[ModuleType]:
    """The package in sys.path for a time, its model loaded."""
    _write(folder / "sglang" / "jit_kernel" / "diffusion", SOURCES)
    (folder / "sglang" / "model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("sglang.model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ModuleType]:
    with package(tmp_path) as loaded:
        yield loaded


def of(module: str) -> Any:
    return importlib.import_module(f"{HOME}.{module}")


def test_what_is_routed_and_back_again(model: ModuleType) -> None:
    touched = (of("residual_gate_add"), of("group_norm_silu"), model)
    kept = [dict(vars(module)) for module in touched]
    with sglang.install() as routes:
        assert len(routes.places) == 6
        assert routes.left == []
        assert f"{HOME}.group_norm_silu.apply_group_norm_silu: ltxkern.group_norm_silu" in str(routes)
        x, norm = torch.randn(2, 8, 3, 4), nn.GroupNorm(2, 8)
        with torch.no_grad():
            got = model.apply_group_norm_silu(x, norm, nn.SiLU())
            torch.testing.assert_close(got, F.silu(norm(x)))
            assert model.apply_group_norm_silu(x, norm, nn.GELU())[1] == "theirs"
        rows, gate = torch.randn(2, 5, 8), torch.randn(1, 1, 8)
        torch.testing.assert_close(model.gate_add(rows, rows, gate), rows + rows * gate)
        assert model.gate_add(rows.double(), rows.double(), gate.double()) == "theirs"
        assert of("residual_gate_add").can_use_residual_gate_add_cuda(rows, rows, gate)
        assert not of("residual_gate_add").can_use_residual_gate_add_cuda(object(), object(), object())
        again = sglang.install()
        assert again.places == {}
        assert {one.reason for one in again.left} == {"it is routed already"}
    assert [dict(vars(module)) for module in touched] == kept
    assert model.gate_add(rows, rows, gate) == "theirs"


def test_norms_and_rotation(model: ModuleType) -> None:
    x, y, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(8)
    scale, shift, gate = torch.randn(2, 1, 8), torch.randn(8), torch.randn(2, 5, 8)
    theirs = of("cutedsl.scale_residual_norm_scale_shift")
    with sglang.install():
        got = theirs.fused_norm_scale_shift(x, weight, None, scale, shift, "rms", 1e-6)
        torch.testing.assert_close(got, F.rms_norm(x, (8,), weight, 1e-6) * (1 + scale) + shift)
        normed, moved = theirs.fused_scale_residual_norm_scale_shift(x, y, gate, None, None, scale, shift, "rms", 1e-6)
        torch.testing.assert_close(moved, x + y * gate)
        torch.testing.assert_close(normed, F.rms_norm(x + y * gate, (8,), None, 1e-6) * (1 + scale) + shift)
        for changed in ({"norm_type": "layer"}, {"bias": weight}, {"gate": None}, {"scale": torch.ones(1)}):
            given = {"gate": gate, "weight": None, "bias": None, "scale": scale, "shift": shift, "norm_type": "rms"}
            assert theirs.fused_scale_residual_norm_scale_shift(x, y, **{**given, **changed}) == "theirs"
        rotate = of("triton.ltx2_qknorm").ltx2_qknorm_split_rope_pair
        k = torch.randn(2, 7, 8)
        tables = [torch.randn(2, 2, tokens, 2) for tokens in (5, 5, 7, 7)]
        wanted = ltxkern.qk_norm_rope(x, k, weight, weight, *tables[:2], k_cos=tables[2], k_sin=tables[3])
        torch.testing.assert_close(rotate(x, k, weight, weight, *tables, 1e-6), wanted)
        assert rotate(x, k, weight.double(), weight, *tables, 1e-6) == "theirs"
        assert rotate(x, k, weight, weight, tables[2], tables[3], *tables[2:], 1e-6) == "theirs"


def test_where_functions_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken through the package in front of them, before and after `install`, they are ours, and theirs again behind it."""
    _write(tmp_path / "sglang" / "kernels", {**NOW, "ops/diffusion/__init__": FACADE})
    monkeypatch.syspath_prepend(str(tmp_path))
    front: Any = importlib.import_module("sglang.kernels.ops.diffusion")
    before = front.residual_gate_add
    x, y, k, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.rand(8)
    cos, sin, k_cos, k_sin = (torch.randn(2, 2, tokens, 2) for tokens in (5, 5, 7, 7))
    sides, heads = (x, cos, sin, weight, k, k_cos, k_sin, weight), {"num_heads": 2, "head_dim": 4}
    with sglang.install() as routes:
        assert (len(routes.places), routes.left) == (8, [])
        torch.testing.assert_close(front.residual_gate_add(x, y, weight), x + y * weight)
        assert front.residual_gate_add(x, y, weight.double()) == "theirs"
        assert front.can_use_residual_gate_add_cuda(x, y, weight)
        norm = nn.GroupNorm(2, 8)
        torch.testing.assert_close(front.apply_group_norm_silu(k.mT, norm, nn.SiLU()), F.silu(norm(k.mT)))
        normed = F.rms_norm(x, (8,), weight, 1e-6) * (1 + y) + y
        torch.testing.assert_close(front.fused_norm_scale_shift(x, weight, None, y, y, "rms", 1e-6), normed)
        wanted = ltxkern.qk_norm_rope(x, k, weight, weight, cos, sin, k_cos=k_cos, k_sin=k_sin)
        assert front.can_use_ltx2_qknorm_split_rope_cuda(*sides, **heads)
        torch.testing.assert_close(front.ltx2_qknorm_split_rope_cuda(*sides, eps=1e-6, **heads), wanted)
        for other in ((*sides[:3], weight.double(), *sides[4:]), (*sides[:-1], None)):
            assert not front.can_use_ltx2_qknorm_split_rope_cuda(*other, **heads)
            assert front.ltx2_qknorm_split_rope_cuda(*other, eps=1e-6, **heads) == "theirs"
    assert front.residual_gate_add is before
    assert front.ltx2_qknorm_split_rope_cuda(*sides, eps=1e-6, **heads) == "theirs"
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


def test_other_versions_are_told(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{HOME}.triton.ltx2_qknorm", None)
    monkeypatch.delattr(of("residual_gate_add"), "residual_gate_add_cuda")
    with sglang.install() as routes:
        reasons = {one.place.rpartition(".")[2]: one.reason for one in routes.left}
        assert reasons["residual_gate_add_cuda"] == "this version has no such function"
        assert reasons["ltx2_qknorm_split_rope_pair"].startswith("its module does not load")
        assert len(routes.places) == 4


def test_without_sglang() -> None:
    if "sglang" in sys.modules:
        pytest.skip("sglang is here")
    with pytest.raises(ImportError, match="sglang is not installed: pip install sglang"):
        sglang.install()
