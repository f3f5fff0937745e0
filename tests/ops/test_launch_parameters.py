"""Launches of every op on every compiled tier: kernels that the build has, and parameters as the kernels' C++ structs have them."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern import dispatch
from ltxkern.compiled import extension, merge_lora
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter
from ltxkern.ops.res2s_step import res2s_steps
from tests.csrc import registered
from tests.csrc.registered import Field
from tests.ops.contract import noise

HALVES = (torch.float16, torch.bfloat16, torch.float32)
ROOMY = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20
)
# No group of the larger norm cases fits one block or cluster: then it is the second-level cache that decides.
DEVICES = {
    "roomy": ROOMY,
    "small": SimpleNamespace(**vars(ROOMY) | {"shared_memory_per_block_optin": 6 << 10}),
    "no second-level cache": SimpleNamespace(
        **vars(ROOMY) | {"shared_memory_per_block_optin": 6 << 10, "L2_cache_size": 4}
    ),
}
Made = Callable[[], Any]


def sampler_calls(width: int) -> Iterator[tuple[str, Made]]:
    """The sampler's ops and the elementwise ones, in every dtype."""
    step = res2s_steps([0.9, 0.5, 0.2])[0]
    for dtype in (*HALVES, torch.float64):
        a, b, c = (noise(1, 6, width, dtype=dtype, seed=seed) for seed in range(3))
        yield "normalize_noise", partial(ltxkern.normalize_noise, a)
        yield "channelwise_normalize", partial(ltxkern.channelwise_normalize, a)
        yield "noise_statistics", partial(ltxkern.noise_statistics, a)
        for rescale in (0.0, 0.5):
            yield (
                "combine_guidance",
                partial(ltxkern.combine_guidance, a, b, cfg_scale=3, rescale_scale=rescale),
            )
        yield "dual_add", partial(ltxkern.dual_add, a[:, :5], b[:, :5], c[:, :5])
        yield "res2s_sde_step", partial(ltxkern.res2s_sde_step, a, b, 0.8, 0.5, c)
        for wide in (torch.float32, torch.float64):
            yield "res2s_midpoint", partial(ltxkern.res2s_midpoint, a, b, c, step, compute_dtype=wide)
            yield "res2s_advance", partial(ltxkern.res2s_advance, a.to(wide), b, b, c, step)


def transformer_calls(width: int) -> Iterator[tuple[str, Made]]:
    """The ops over rows, plain and with tables, and the merge."""
    for dtype in HALVES:
        a, b = noise(2, 6, 2 * width, dtype=dtype), noise(2, 6, 2 * width, dtype=dtype, seed=1)
        row, angles = b[:, :1], noise(1, 2, 6, width // 2 or 1)
        rows, table = torch.zeros(2, 6, dtype=torch.int32), b[0]
        q = noise(1, 6, 4 * (width // 2), dtype=dtype)
        weight = noise(q.shape[-1], dtype=dtype)
        yield "rms_norm_modulate", partial(ltxkern.rms_norm_modulate, a, row, row)
        yield "rms_norm_modulate", partial(ltxkern.rms_norm_modulate, a, table, table, rows=rows)
        yield "gated_residual_rms_norm_modulate", partial(ltxkern.gated_residual_rms_norm_modulate, a, b, row, row, row)
        yield "gated_residual", partial(ltxkern.gated_residual, a, b, row)
        yield "gated_residual", partial(ltxkern.gated_residual, a, b, table, rows=rows)
        yield "head_gate", partial(ltxkern.head_gate, a[None], a[None, ..., 0])
        yield "qk_norm_rope", partial(ltxkern.qk_norm_rope, q, q, weight, weight, angles, angles)
    for dtype, weight_dtype, rank in (
        (torch.float32, torch.float32, 4),
        *((half, weight, 65) for half in HALVES[:2] for weight in (torch.float32, torch.float8_e4m3fn)),
    ):
        merged, down, up = noise(8, 8).to(weight_dtype), noise(rank, 8, dtype=dtype), noise(8, rank, dtype=dtype)
        yield "merge_lora_", partial(ltxkern.merge_lora_, merged, down, up)


def misaligned(x: Tensor) -> Tensor:
    """The same values, off the 16-byte boundary."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def norm_calls() -> Iterator[tuple[str, Made]]:
    """The norms of the decoder, in both layouts."""
    for dtype in HALVES:
        for shape in ((1, 8, 4096), (1, 6, 33)):
            x = noise(*shape, dtype=dtype)
            weight, bias = noise(shape[1], dtype=dtype), noise(shape[1], dtype=torch.float32, seed=1)
            for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), misaligned(x)):
                yield "group_norm_silu", partial(ltxkern.group_norm_silu, given, weight, bias, 1, residual=given)
                yield "group_norm_silu", partial(ltxkern.group_norm_silu, given, None, None, 2, conv_bias=weight)
                yield "pixel_norm_silu", partial(ltxkern.pixel_norm_silu, given, weight=weight)


def forget() -> None:
    """Programs of the launch modules, and limits of devices, are made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ltxkern.compiled.") and module not in (extension,):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == name:
                    value.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, list[Launch | Call]]]]:
    """By op, the steps of real calls on a tier: made, but not run."""

    def all_of(tier: str) -> dict[str, list[Launch | Call]]:
        made: list[Any] = []

        def record(steps: Sequence[Any], arguments: int) -> Callable[..., None]:
            made.extend(steps)
            return lambda *tensors: None

        monkeypatch.setattr(extension, "cpu_program", record)
        monkeypatch.setattr(extension, "program_builder", lambda tier: record)
        monkeypatch.setattr(merge_lora, "SMALL_RANK", 64)
        # Nothing runs: the launches of a tier are made where there is neither a device nor an extension.
        monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
        for op in dispatch._registry.values():
            monkeypatch.setattr(op, "_present", {})
        found: dict[str, list[Launch | Call]] = {}
        for device in DEVICES.values() if tier == "cuda" else [ROOMY]:
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, of=device: of)
            forget()
            for name, call in (
                *(pair for width in (16, 7) for pair in (*sampler_calls(width), *transformer_calls(width))),
                *norm_calls(),
            ):
                known = dispatch._registry[name]
                if tier not in known._backends:
                    continue
                made.clear()
                # On CPU tensors, so in the CPU tier's name.
                monkeypatch.setitem(known._kernels, "cpu", known._backends[tier].load())
                with ltxkern.use_backend("cpu"):
                    call()
                found.setdefault(name, []).extend(step for step in made if isinstance(step, (Launch, Call)))
        return found

    yield all_of
    monkeypatch.undo()
    forget()


def kind(value: Parameter) -> str:
    """How a value is packed."""
    if value is None or isinstance(value, Argument):
        return "pointer"
    return {int: "integer", float: "double"}.get(type(value), str(type(value)))


def difference(parameters: Mapping[str, Parameter], wanted: Sequence[Field]) -> str | None:
    """Where given parameters are not the fields of a struct, by name, place and kind; None where they are."""
    given = [Field(name, kind(value)) for name, value in parameters.items()]
    if len(given) != len(wanted):
        return f"{len(given)} parameters for {len(wanted)} fields"
    at = next((i for i, pair in enumerate(zip(given, wanted, strict=True)) if pair[0] != pair[1]), None)
    return None if at is None else f"parameter {at} is {given[at]}, the field {wanted[at]}"


@pytest.mark.parametrize("tier", ["cuda", "cpu"])
def test_parameters_are_the_fields_of_the_kernels_structs(
    tier: str, launches: Callable[[str], dict[str, list[Launch | Call]]]
) -> None:
    known = registered.cuda_kernels() if tier == "cuda" else registered.cpu_kernels()
    fields = functools.cache(registered.parameters)
    steps = launches(tier)
    # The CPU merge is torch's own products in chunks: no kernel of ours.
    wanted = {name for name, op in dispatch._registry.items() if tier in op._backends} - {
        tier == "cpu" and "merge_lora_"
    }
    assert {op for op, made in steps.items() if made} == wanted
    for op, made in steps.items():
        for step in made:
            assert step.kernel in known, f"{op} launches {step.kernel}, which csrc does not register"
            wrong = difference(step.parameters, fields(known[step.kernel]))
            assert wrong is None, f"{step.kernel} of {op}: {wrong}"
    assert {step.kernel for made in steps.values() for step in made} == set(known), "a kernel that no case launches"


@pytest.mark.skipif(
    extension.unavailable("cpu") is not None, reason=f"KERNELS OF THE BUILD NOT TESTED: {extension.unavailable('cpu')}"
)
def test_the_build_has_the_kernels_that_the_sources_register() -> None:
    assert set(extension.module().cpu_kernels()) == set(registered.cpu_kernels())
    assert set(extension.module().kernels()) in (set(), set(registered.cuda_kernels()))


SWAPS = {
    "two sizes": ("channels", "positions"),
    "two tensors": ("x", "out"),
    "a size and eps": ("samples", "eps"),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_swapped_names_or_fields_are_seen(
    swap: tuple[str, str], launches: Callable[[str], dict[str, list[Launch | Call]]]
) -> None:
    step = launches("cpu")["pixel_norm_silu"][0]
    wanted = registered.parameters(registered.cpu_kernels()[step.kernel])
    other = dict(zip(swap, reversed(swap), strict=True))
    renamed = {other.get(name, name): value for name, value in step.parameters.items()}
    moved = [field._replace(name=other.get(field.name, field.name)) for field in wanted]
    assert difference(step.parameters, wanted) is None
    assert difference(replace(step, parameters=renamed).parameters, wanted) is not None
    assert difference(step.parameters, moved) is not None


def test_a_value_of_the_wrong_kind_is_seen() -> None:
    wanted = [Field("eps", "double"), Field("x", "pointer")]
    assert difference({"eps": 1.0, "x": None}, wanted) is None
    assert "parameter 0" in str(difference({"eps": 1, "x": Argument(0)}, wanted))
    assert "parameter 1" in str(difference({"eps": 1.0, "x": 0}, wanted))
    assert "2 fields" in str(difference({"eps": 1.0}, wanted))


def test_fields_of_bases_arrays_and_structs_within() -> None:
    text = """
    constexpr int kTwo = 2;
    struct Inner { const void* data; i64 type; i64 at(i64 i) const { if (i) { return i; } return type; } };
    struct Base { i64 first, second; };
    struct Whole : Base { Inner inner[kTwo]; double eps; };
    """
    assert [tuple(field) for field in registered.fields(text, "Whole")] == [
        *(("first", "integer"), ("second", "integer")),
        *(("inner[0].data", "pointer"), ("inner[0].type", "integer")),
        *(("inner[1].data", "pointer"), ("inner[1].type", "integer")),
        ("eps", "double"),
    ]
