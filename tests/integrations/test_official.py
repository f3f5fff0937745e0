"""The callables for `ltx_core`'s operation slots, against the compositions that stand in its blocks."""

import sys
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.integrations import official
from tests.ops.contract import compiled


class RopeType(Enum):
    INTERLEAVED = "interleaved"
    SPLIT = "split"


class PytorchFunction:
    """Of the class that the block was built with: told by its name."""

    def __call__(self, *args: Any) -> None:
        raise AssertionError("the slot was not filled")


class FusedAdaZero:
    def __call__(self, *args: Any) -> None:
        raise AssertionError("not called")


class Attention(nn.Module):
    """The attributes and slots of the official attention, and its forward without perturbation."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.dim_head, self.rope_type = heads, width // heads, RopeType.SPLIT
        self.q_norm, self.k_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_gate_logits, self.to_out = nn.Linear(width, heads), nn.Linear(width, width)
        self.attention_function = self.masked_attention_function = PytorchFunction()
        self.preattention_function, self.gated_attention_function = PytorchFunction(), PytorchFunction()

    def forward(self, x: Tensor, context: Tensor, pe: Any, k_pe: Any = None) -> Tensor:
        q, k = self.preattention_function(self.to_q(x), self.to_k(context), self, None, pe, k_pe)
        out = self.attention_function(q, k, self.to_v(context), self.heads)
        return self.to_out(self.gated_attention_function(x, out, self))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.norm_eps = Attention(), 1e-6
        self.ada_zero_function, self.post_sa_function = PytorchFunction(), PytorchFunction()

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, pe: Any) -> tuple[Tensor, Tensor]:
        normed = self.ada_zero_function(x, self.norm_eps, scale, shift)
        moved, after = self.post_sa_function(x, self.attn1(normed, normed, pe), None, self.norm_eps, gate)
        return moved, after


def rotated(x: Tensor, pe: tuple[Tensor, Tensor], kind: RopeType) -> Tensor:
    """The official rotation, in fp64 where x is."""
    cos, sin = pe
    if kind is RopeType.INTERLEAVED:
        first, second = x[..., 0::2], x[..., 1::2]
        return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin
    first, second = x.unflatten(-1, (cos.shape[1], -1)).transpose(1, 2).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).transpose(1, 2).flatten(-2)


def attended(module: Attention, x: Tensor, context: Tensor, pe: Any, k_pe: Any = None) -> Tensor:
    """The official forward by its compositions."""
    q, k, v = module.q_norm(module.to_q(x)), module.k_norm(module.to_k(context)), module.to_v(context)
    if pe is not None:
        q, k = rotated(q, pe, module.rope_type), rotated(k, pe if k_pe is None else k_pe, module.rope_type)
    q, k, v = (one.unflatten(-1, (module.heads, -1)).transpose(1, 2) for one in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return module.to_out((out * (2 * module.to_gate_logits(x).sigmoid())[..., None]).flatten(-2))


def tables(tokens: int, heads: int = 2, half: int = 4) -> tuple[Tensor, Tensor]:
    angles = torch.randn(1, heads, tokens, half)
    return angles.cos(), angles.sin()


def slots_of(block: nn.Module) -> list[Any]:
    return [value for one in block.modules() for name, value in vars(one).items() if name.endswith("_function")]


@torch.no_grad()
def test_a_block_with_filled_slots() -> None:
    torch.manual_seed(0)
    block = Block()
    x, pe = torch.randn(2, 5, 16), tables(5)
    shift, scale, gate = (torch.randn(2, 1, 16) for _ in range(3))
    held = slots_of(block)
    normed = F.rms_norm(x, (16,), None, 1e-6) * (1 + scale) + shift
    moved = x + attended(block.attn1, normed, normed, pe) * gate
    wanted = moved, F.rms_norm(moved, (16,), None, 1e-6)
    with official.install(block, attention=True) as routes:
        names = ("attention", "gated_attention", "preattention")
        expected = {".ada_zero_function", ".post_sa_function", *(f"attn1.{name}_function" for name in names)}
        assert set(routes.places) == expected
        torch.testing.assert_close(block(x, shift, scale, gate, pe), wanted)
    assert slots_of(block) == held
    with official.install(block) as routes:
        assert "attn1.attention_function" not in routes.places


@torch.no_grad()
@pytest.mark.parametrize("case", ["no rotation", "own keys", "interleaved", "fp64", "wide tables", "other eps"])
def test_preattention_of_every_kind(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the op does not serve goes by the module's norms and ltx_core's own rotation."""
    torch.manual_seed(1)
    module, context, pe, k_pe = Attention(), torch.randn(2, 7, 16), tables(5), tables(7)
    x = torch.randn(2, 5, 16)
    core = ModuleType("ltx_core.model.transformer.rope")
    core.apply_rotary_emb = rotated  # type: ignore[attr-defined]
    for name in ("ltx_core", "ltx_core.model", "ltx_core.model.transformer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    given: tuple[Any, Any] = (pe, k_pe)
    match case:
        case "no rotation":
            given = None, None
        case "interleaved":
            module.rope_type = RopeType.INTERLEAVED
            given = tuple(
                tuple(one.transpose(1, 2).flatten(2).repeat_interleave(2, -1) for one in pair) for pair in given
            )
        case "fp64":
            module, x, context = module.double(), x.double(), context.double()
            given = tuple(tuple(one.double() for one in pair) for pair in given)
        case "wide tables":
            given = tuple(tuple(one.double() for one in pair) for pair in given)
        case "other eps":
            module.k_norm.eps = 1e-3
    official.install(module, attention=True)
    if case == "wide tables":
        got = official.preattention(module.to_q(x), module.to_k(context), module, None, *given)
        wanted = rotated(module.q_norm(module.to_q(x)), given[0], module.rope_type)
        torch.testing.assert_close(got[0], wanted)
        return
    torch.testing.assert_close(module(x, context, *given), attended(module, x, context, *given))


@torch.no_grad()
def test_masks_weights_and_other_dtypes() -> None:
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    split = [one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (q, k, v)]
    for shape in ((5, 7), (2, 5, 7), (2, 1, 5, 7)):
        mask = torch.randn(shape)
        wide = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else mask[None, None]
        wanted = F.scaled_dot_product_attention(*split, attn_mask=wide).transpose(1, 2).flatten(-2)
        torch.testing.assert_close(official.attention(q, k, v, 2, mask), wanted)
    for dtype in (torch.float32, torch.float64):
        x, y, weight = (
            torch.randn(2, 5, 16, dtype=dtype),
            torch.randn(2, 5, 16, dtype=dtype),
            torch.rand(16, dtype=dtype),
        )
        gate = torch.randn(2, 1, 16, dtype=dtype)
        moved, normed = official.post_sa(x, y, weight, 1e-6, gate)
        torch.testing.assert_close(moved, x + y * gate)
        torch.testing.assert_close(normed, F.rms_norm(x + y * gate, (16,), weight, 1e-6))
        torch.testing.assert_close(
            official.ada_zero(x, 1e-6, gate, gate), F.rms_norm(x, (16,), None, 1e-6) * (1 + gate) + gate
        )


@torch.no_grad()
def test_row_ops_are_traced_whole() -> None:
    x, gate = torch.randn(2, 5, 16), torch.randn(2, 1, 16)

    def block(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return official.post_sa(x, official.ada_zero(x, 1e-6, gate, gate), None, 1e-6, gate)

    torch.testing.assert_close(compiled(block)(x, gate), block(x, gate))


def test_what_is_left_and_refused() -> None:
    block = Block()
    block.ada_zero_function = FusedAdaZero()
    routes = official.install(block)
    assert [tuple(one) for one in routes.left] == [(".ada_zero_function", "it holds FusedAdaZero")]
    assert str(routes).splitlines()[-1] == ".ada_zero_function: left, it holds FusedAdaZero"
    again = official.install(block)
    assert again.places == {}
    with pytest.raises(ValueError, match="model has no module with operation slots"):
        official.install(nn.Linear(2, 2))
    assert set(official.Operations()._fields) == {"attention", "preattention", "gated_attention", "ada_zero", "post_sa"}
