"""Launches of every op on every compiled tier: kernels that the build has, and parameters as the kernels' C++ structs have them."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ltxkern import dispatch, use_backend
from ltxkern.compiled import extension, merge_lora
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter
from ltxkern.verify.cases import CASES, Size
from tests.csrc import registered
from tests.csrc.registered import Field
from tests.ops.contract import misaligned
from tests.serving import needs_cpu_kernels

DEVICE = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10)
# With whole vectors in every row, and without; with rows of whole warps, and with tokens of them.
SIZES = (Size(1, 16, 64), Size(2, 16, 64), Size(1, 3, 7), Size(1, 2, 1024), Size(1, 2, 256), Size(1, 2, 128))
Steps = dict[str, list[Launch | Call]]


def forget() -> None:
    """Programs of the launch modules, and limits of devices, are made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ltxkern.compiled.") and module is not extension:
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == name:
                    value.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Steps]]:
    """By op, the steps of real calls on a tier: made, but not run, so that neither a device nor an extension is needed."""
    made: list[Any] = []

    def record(steps: Sequence[Any], arguments: int) -> Callable[..., None]:
        made.extend(steps)
        return lambda *tensors: None

    def all_of(tier: str) -> Steps:
        found: Steps = {}
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: DEVICE)
        forget()
        for case in CASES:
            op = dispatch._registry[case.op]
            if tier not in op._backends:
                continue
            # On CPU tensors, so in the CPU tier's name.
            monkeypatch.setitem(op._kernels, "cpu", op._backends[tier].load())
            for dtype in case.dtypes:
                for tensors in (case.tensors(dtype, size) for size in SIZES):
                    given = tensors if case.last else {name: misaligned(value, 1) for name, value in tensors.items()}
                    with use_backend("cpu"):
                        case.run(tensors)
                        case.run(given)
            found.setdefault(case.op, []).extend(step for step in made if isinstance(step, (Launch, Call)))
            made.clear()
        # What moves weights between LoRA phases is chosen with the merge, and called by the pipeline alone.
        switches = [merge_lora.Switch(half, 4096, 1, 0.25, 0.5) for half in merge_lora.HALVES] if tier == "cuda" else ()
        found.setdefault("merge_lora_", []).extend(step for case in switches for step in merge_lora.switch_steps(case))
        return found

    monkeypatch.setattr(extension, "cpu_program", record)
    monkeypatch.setattr(extension, "program_builder", lambda tier: record)
    # As much as is counted on.
    monkeypatch.setattr(extension, "held", lambda *launch: 1 << 20)
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    monkeypatch.setattr(dispatch, "_waiting", lambda backend: False)
    for op in dispatch._registry.values():
        monkeypatch.setattr(op, "_present", {})
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
def test_parameters_are_the_fields_of_the_kernels_structs(tier: str, launches: Callable[[str], Steps]) -> None:
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


@needs_cpu_kernels
def test_the_build_has_the_kernels_that_the_sources_register() -> None:
    assert set(extension.module().cpu_kernels()) == set(registered.cpu_kernels())
    assert set(extension.module().kernels()) in (set(), set(registered.cuda_kernels()))


def test_swapped_names_or_fields_are_seen(launches: Callable[[str], Steps]) -> None:
    step = launches("cpu")["pixel_norm_silu"][0]
    wanted = registered.parameters(registered.cpu_kernels()[step.kernel])
    assert difference(step.parameters, wanted) is None
    for one, other in (("channels", "positions"), ("x", "out"), ("samples", "eps")):
        swapped = {one: other, other: one}
        renamed = {swapped.get(name, name): value for name, value in step.parameters.items()}
        moved = [field._replace(name=swapped.get(field.name, field.name)) for field in wanted]
        assert difference(renamed, wanted) is not None
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
