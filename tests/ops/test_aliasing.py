"""Outputs that share memory with inputs: exactly an input where the op says so, refused before anything is written otherwise."""

import itertools
import random
import re

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.aliasing import folded, same, share_memory
from ltxkern.verify.cases import BY_NAME, STEP, WITH_OUT, OpCase
from tests.ops.contract import compiled, noise
from tests.serving import backends_of, serving

CALLS = pytest.mark.parametrize("call", WITH_OUT, ids=str)
IN_PLACE = [
    ((call, output, name), backend)
    for call in WITH_OUT
    for output, names in enumerate(call.may_be)
    for name in names
    for backend in backends_of(call.op)
]


@pytest.mark.usefixtures("backend_device")
@pytest.mark.parametrize(
    ("case", "backend"), IN_PLACE, ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value
)
def test_an_output_may_be_an_input(case: tuple[OpCase, int, str], backend: str) -> None:
    """Bit-equal to the result in memory of its own."""
    call, output, name = case
    for dtype in call.dtypes:
        tensors = call.tensors(dtype)
        with serving(backend):
            expected = call.run(tensors)
            if tensors[name].dtype != expected[output].dtype:
                continue
            outputs = [torch.full_like(value, torch.nan) for value in expected]
            outputs[output] = tensors[name]
            results = call.run(tensors, outputs)
        assert results[output] is tensors[name]
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)


@CALLS
def test_the_docstring_names_what_an_output_may_be(call: OpCase) -> None:
    text = re.search(r"^        out: (.*?)^    Returns:", str(call.function.__doc__), re.DOTALL | re.MULTILINE)
    assert text is not None
    named = {"cond", "uncond", "perturbed", "isolated"} if "one of the predictions" in text[1] else set()
    assert {name for names in call.may_be for name in names} == named | set(re.findall(r"\w+", text[1])) & set(
        call.tensors()
    )


@CALLS
def test_another_input_is_refused(call: OpCase) -> None:
    tensors = call.tensors()
    kept = {name: value.clone() for name, value in tensors.items()}
    for output, (model, legal) in enumerate(zip(call.like, call.may_be, strict=True)):
        for name, value in tensors.items():
            if name in legal or value.shape != tensors[model].shape:
                continue
            outputs = call.outputs(tensors)
            outputs[output] = value
            with pytest.raises(
                ValueError, match=rf"^out(\[{output}\])? overlaps {name}: give out(\[{output}\])? memory"
            ):
                call.run(tensors, outputs)
    assert all(torch.equal(value, kept[name]) for name, value in tensors.items())


def moved_together(value: Tensor, model: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """The values of `value`, and a tensor like `model` that begins `shift` bytes behind them, in the same memory."""
    memory = torch.zeros(value.nbytes + model.nbytes + abs(shift), dtype=torch.uint8)
    places = []
    for tensor, begin in ((value, max(0, -shift)), (model, max(0, shift))):
        flat = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        places.append(flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset()))
    return places[0].copy_(value), places[1]


@CALLS
@pytest.mark.parametrize("shift", [16, -16])
def test_an_overlap_in_part_is_refused(call: OpCase, shift: int) -> None:
    """With every input in turn, for every output; the message says what to give, and no value has changed."""
    for name, output in itertools.product(call.tensors(), range(len(call.like))):
        tensors = call.tensors()
        outputs = call.outputs(tensors)
        tensors[name], outputs[output] = moved_together(tensors[name], outputs[output], shift)
        kept = tensors[name].clone()
        legal = name in call.may_be[output]
        words = f"in part: give {name} itself or memory" if legal else r": give out(\[\d\])? memory"
        with pytest.raises(ValueError, match=rf"^out(\[{output}\])? overlaps {name} {words}".replace(" :", ":")):
            call.run(tensors, outputs)
        assert torch.equal(tensors[name], kept)


@CALLS
def test_outputs_side_by_side_are_fine(call: OpCase) -> None:
    """Blocks of columns of one matrix lie within each other and share nothing."""
    tensors = call.tensors()
    expected = call.run(tensors)
    names = list(tensors)
    columns = tensors[call.like[0]].shape[-1]
    wide = torch.full((*tensors[call.like[0]].shape[:-1], 4 * columns), torch.nan)
    blocks = wide.split(columns, dim=-1)
    first = next(name for name in names if name == call.like[0])
    tensors[first] = blocks[0].copy_(tensors[first])
    results = call.run(tensors, list(blocks[1 : 1 + len(call.like)]))
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", [call for call in WITH_OUT if len(call.like) > 1], ids=str)
def test_outputs_that_are_one_are_refused(call: OpCase) -> None:
    tensors = call.tensors()
    one = call.outputs(tensors)[0]
    with pytest.raises(ValueError, match=r"^out\[0\] and out\[1\] overlap: give each memory of its own$"):
        call.run(tensors, [one] * len(call.like))


@CALLS
def test_an_expanded_output_is_refused(call: OpCase) -> None:
    tensors = call.tensors()
    outputs = call.outputs(tensors)
    outputs[0] = torch.zeros(1).expand(outputs[0].shape)
    with pytest.raises(ValueError, match=r"^out(\[0\])? has elements that may share memory, shape"):
        call.run(tensors, outputs)


def test_lists_of_modalities_meet_only_within_their_own() -> None:
    states = [noise(1, 6, 4, seed=seed) for seed in range(4)]
    latents, free = states[:2], states[2:]
    given = (latents, [noise(1, 6, 4, seed=8)] * 2, [noise(1, 6, 4, seed=9)] * 2, STEP)
    expected = [part[0].clone() for part in ltxkern.res2s_midpoint(*given, compute_dtype=torch.float32)]
    with pytest.raises(ValueError, match=r"^out\[0\]\[1\] overlaps latent\[0\]: give out\[0\]\[1\] memory of its own$"):
        ltxkern.res2s_midpoint(*given, compute_dtype=torch.float32, out=([free[0], latents[0]], [free[1], latents[1]]))
    with pytest.raises(ValueError, match=r"^out\[0\]\[0\] and out\[1\]\[1\] overlap"):
        ltxkern.res2s_midpoint(*given, compute_dtype=torch.float32, out=([free[0], free[1]], [latents[0], free[0]]))
    ltxkern.res2s_midpoint(*given, compute_dtype=torch.float32, out=(latents, free))
    assert torch.equal(latents[0], expected[0])
    assert torch.equal(free[0], expected[1])


def test_statistics_beside_their_noise() -> None:
    memory = torch.zeros(3 * 40 * 8 + 9, dtype=torch.float64)
    draw = memory[: 3 * 40 * 8].view(3, 40, 8).copy_(noise(3, 40, 8))
    with pytest.raises(ValueError, match=r"^out overlaps noise: give out memory of its own$"):
        ltxkern.noise_statistics(draw, out=memory[-12:-3].view(3, 3))
    out = ltxkern.noise_statistics(draw, out=memory[-9:].view(3, 3))
    assert torch.equal(out, ltxkern.noise_statistics(draw))


def test_a_weight_is_no_factor_of_itself() -> None:
    call = BY_NAME["merge_lora_"]
    tensors = call.tensors()
    weight = tensors["weight"]
    kept = weight.clone()
    for name, part in (("lora_a", weight[:2]), ("lora_b", weight[:, 6:])):
        with pytest.raises(ValueError, match=rf"^weight overlaps {name}\[0\]: give weight memory of its own$"):
            call.run({**tensors, name: part})
    with pytest.raises(ValueError, match=r"^weight has elements that may share memory"):
        call.run({**tensors, "weight": torch.zeros(8).expand(6, 8)})
    assert torch.equal(weight, kept)


def test_a_terminal_step_copies_or_refuses() -> None:
    memory = noise(1, 8, 8).flatten()
    state, target = memory[:32].view(1, 4, 8), memory[4:36].view(1, 4, 8)
    with pytest.raises(ValueError, match=r"^out overlaps denoised in part: give denoised itself or memory of its own$"):
        ltxkern.res2s_sde_step(state.clone(), state, 0.9, 0.0, state.clone(), out=target)
    assert ltxkern.res2s_sde_step(state.clone(), state, 0.9, 0.0, state.clone(), out=state) is state


def test_a_compiled_caller_gets_the_right_values() -> None:
    """Functionalisation copies an output that is an input before the op runs."""
    tensors = BY_NAME["rms_norm_modulate"].tensors()
    x, scale = tensors["x"], tensors["scale"]
    expected = ltxkern.rms_norm_modulate(x, scale, scale)

    def into(x: Tensor, scale: Tensor) -> Tensor:
        ltxkern.rms_norm_modulate(x, scale, scale, out=scale)
        return scale + 0

    assert torch.equal(compiled(into)(x, scale), expected)


def test_tensors_without_memory() -> None:
    x = torch.empty(1, 4, 3, device="meta")
    assert ltxkern.pixel_norm_silu(x, out=torch.empty_like(x)).is_meta
    empty = torch.empty(0, 4, 3)
    assert ltxkern.pixel_norm_silu(empty, out=torch.empty(0, 4, 3)).numel() == 0


def views(generator: random.Random, memory: Tensor) -> Tensor:
    """A random view of up to three dims, some folded upon themselves."""
    shape = [generator.randint(1, 4) for _ in range(generator.randint(0, 3))]
    stride = [generator.choice([0, 1, 2, 3, 4, 6, 9]) for _ in shape]
    reach = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    dtype = generator.choice([torch.int16, torch.int32, torch.int64])
    typed = memory.view(dtype)
    assert reach < typed.numel() - 20
    return typed.as_strided(shape, stride, generator.randint(0, 20))


def addresses(view: Tensor) -> set[int]:
    """Bytes that the elements of a view occupy, counted from its memory."""
    size, places = view.element_size(), [view.storage_offset()]
    for n, stride in zip(view.shape, view.stride(), strict=True):
        places = [place + i * stride for place in places for i in range(n)]
    return {place * size + byte for place in places for byte in range(size)}


def test_shared_bytes_are_found_exactly() -> None:
    """Against the sets of addresses, on views of every kind."""
    generator = random.Random(0)
    memory = torch.zeros(1024, dtype=torch.uint8)
    found = {True: 0, False: 0}
    for _ in range(3000):
        one, other = views(generator, memory), views(generator, memory)
        meet = not addresses(one).isdisjoint(addresses(other))
        assert share_memory(one, other) == share_memory(other, one) == meet, (one.shape, one.stride(), other.stride())
        found[meet] += 1
        if len(addresses(one)) < one.nbytes:
            assert folded(one)
    assert min(found.values()) > 300


def test_same_is_element_for_element() -> None:
    x = torch.zeros(1, 6, 4)
    assert same(x, x.view(6, 4)[None])
    assert same(x, x.as_strided((1, 6, 4), (7, 4, 1)))
    assert not same(x, x.view(torch.int32))
    assert not same(x, x.view(1, 4, 6).transpose(1, 2))
    assert not same(x, x[:, 1:])
