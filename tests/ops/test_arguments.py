"""Wrong arguments of every op: one sentence that names the parameter, what came and, where there is one, what to give."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ltxkern
from ltxkern.verify.cases import MAIN, STEP, OpCase
from tests.ops.contract import noise

NEGATIVE = ("eps", "sigma", "sigma_next", "eta")


def assert_says(error: BaseException, name: str, *words: str) -> None:
    """One sentence that begins with the parameter, says what came, and holds these words."""
    text = str(error)
    assert re.match(rf"{re.escape(name)}(\[\d\])*\b", text), f"{text!r} does not begin with {name}"
    assert "\n" not in text
    assert "got" in text, text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def no_tensors(name: str, value: Tensor) -> Iterator[tuple[str, Any, str]]:
    """What people give in place of a tensor: kind, value, and what the message must say."""
    yield "none", None, "got NoneType"
    yield "float", 1.5, "got float"
    yield "numbers", value.tolist(), "got "
    yield "array", value.numpy(), f"got ndarray: use torch.from_numpy({name})"
    yield "text", "x", "got str"


CALLS = pytest.mark.parametrize("call", MAIN, ids=str)


def numbers_of(call: OpCase) -> list[str]:
    """The parameters of an op that are real numbers."""
    parameters = inspect.signature(call.function).parameters.values()
    return [
        parameter.name for parameter in parameters if inspect.formatannotation(parameter.annotation).startswith("float")
    ]


def refused(call: OpCase, **changed: Any) -> BaseException:
    """The error of a call with changed arguments, of which every tensor must stay as it is."""
    tensors = call.tensors()
    kept = {name: value.clone() for name, value in tensors.items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        call.run(tensors, **changed)
    assert all(torch.equal(value, kept[name]) for name, value in tensors.items())
    return caught.value


@CALLS
def test_no_tensor(call: OpCase) -> None:
    first = next(iter(call.tensors()))
    for name, value in call.tensors().items():
        for kind, wrong, words in no_tensors(name, value):
            if kind == "none" and name in call.optional.split():
                continue
            # An array in the first place makes it a call on arrays.
            if kind == "array" and name == first and not call.in_place:
                continue
            error = refused(call, **{name: wrong})
            if kind == "none" and name in ("mask", "clean", "weight", "bias") and "give both or neither" in str(error):
                continue
            if kind == "none" and call.op == "combine_guidance" and name != "cond":
                assert f"so {name} is needed: give it, or use" in str(error)
                continue
            assert_says(error, name, words if kind != "numbers" else "got")


@CALLS
def test_wrong_dtype(call: OpCase) -> None:
    for name, value in call.tensors().items():
        for dtype in (torch.int64, torch.bool, torch.complex64):
            error = refused(call, **{name: value.to(dtype)})
            assert isinstance(error, TypeError)
            assert_says(error, name, f"got {dtype}", f"use {name}")


@CALLS
def test_wrong_device(call: OpCase) -> None:
    _, *others = call.tensors()
    for name in others:
        error = refused(call, **{name: call.tensors()[name].to("meta")})
        assert isinstance(error, ValueError)
        assert_says(
            error,
            name,
            "must be on cpu, got meta",
            'use {}.to("cpu")'.format(name if "lora" not in name else f"{name}[0]"),
        )


@CALLS
def test_wrong_shape(call: OpCase) -> None:
    first, *others = call.tensors()
    for name in others:
        for change in (lambda value: value[None, None], lambda value: torch.cat([value, value], dim=-1)):
            error = refused(call, **{name: change(call.tensors()[name])})
            assert isinstance(error, ValueError)
            if "lora" not in name:
                assert_says(error, name)
    assert isinstance(refused(call, **{first: noise(3)}), ValueError)


@CALLS
def test_wrong_numbers(call: OpCase) -> None:
    for name in numbers_of(call):
        for wrong in (None, "1", torch.tensor(1.0), [None], True, 1j):
            error = refused(call, **{name: wrong})
            assert isinstance(error, TypeError)
            assert_says(error, name)
        for wrong in (math.nan, math.inf, -math.inf):
            assert_says(refused(call, **{name: wrong}), name, f"must be finite, got {wrong}")
        if name in NEGATIVE:
            assert_says(refused(call, **{name: -1e-3}), name, "must be at least 0.0, got -0.001: use 0.0")


@CALLS
def test_wrong_keywords(call: OpCase) -> None:
    error = refused(call, epsilon=1e-6)
    assert isinstance(error, TypeError)
    assert "epsilon" in str(error)


@pytest.mark.parametrize("call", [call for call in MAIN if call.out], ids=str)
def test_wrong_outputs(call: OpCase) -> None:
    outputs = call.outputs(call.tensors())
    one = outputs[0]
    wrong: list[Any] = [1.5, "x", one.numpy(), {"a": one}]
    if len(outputs) == 1:
        wrong += [one.double(), one[..., :-1], one.to("meta"), one[None], (one, one)]
    else:
        wrong += [
            one,
            torch.stack(outputs),
            (one,),
            (*outputs, one),
            (one, None),
            (one.double(), one),
            (one.to("meta"), one),
        ]
    for value in wrong:
        assert_says(refused(call, out=value), "out")


def integer_cases() -> Iterator[tuple[Callable[..., Any], dict[str, Any], str, list[Any]]]:
    x, w = noise(1, 8, 3), noise(8)
    a, b = noise(2, 8), noise(6, 2)
    merge = {"weight": noise(6, 8), "lora_a": a, "lora_b": b}
    yield (
        ltxkern.group_norm_silu,
        {"x": x, "weight": w, "bias": w},
        "num_groups",
        [None, 2.0, "2", True, w, [2], 0, -2, 3, 16],
    )
    yield ltxkern.merge_lora_, merge, "chunk_bytes", [None, 2.0, "2", True, 0, -1]
    yield ltxkern.merge_lora_, merge, "seed", [None, 2.0, "2", True, -1, 1 << 63]
    yield ltxkern.merge_lora_, merge, "rounding", [None, 1, "nearest", ["single"]]
    many = {"weights": [noise(6, 8)], "lora_a": [a], "lora_b": [b]}
    yield ltxkern.merge_lora_many_, many, "seed", [None, 2.0, "2", True, -1]
    yield ltxkern.merge_lora_many_, many, "scale", [None, "1", [None], w]
    q, table = noise(1, 6, 8), noise(1, 2, 6, 2)
    rope = {"q": q, "k": q, "q_weight": w, "k_weight": w, "cos": table, "sin": table}
    yield ltxkern.qk_norm_rope, rope, "layout", [None, 1, "halves", ["split"]]
    half = {"latent": q, "x0": q, "noise": q}
    yield ltxkern.res2s_midpoint, half, "step", [None, 0.5, [STEP], (1.0, 2.0)]
    full = {"anchor": q, "x0": q, "x0_mid": q, "noise": q}
    yield ltxkern.res2s_advance, full, "step", [None, 0.5, [STEP], (1.0, 2.0)]
    yield ltxkern.res2s_midpoint, {**half, "step": STEP}, "compute_dtype", [None, "float64", torch.bfloat16, float]
    yield ltxkern.res2s_advance, {**full, "step": STEP}, "model_dtype", ["bfloat16", torch.int8, float]
    step = {"sample": q, "denoised": q, "noise": q, "sigma": 0.9, "sigma_next": 0.7}
    yield ltxkern.res2s_sde_step, step, "terminal", [None, 1, "yes", torch.tensor(True)]
    yield (
        ltxkern.res2s_sde_step,
        step,
        "noise_stats",
        [1.5, q, torch.zeros(2, 3, dtype=torch.float64), torch.zeros(1, 3)],
    )


@pytest.mark.parametrize(
    ("op", "given", "name", "values"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[2]}") for case in integer_cases()],
)
def test_other_arguments(op: Callable[..., Any], given: dict[str, Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            op(**{**given, name: value})
        error = caught.value
        assert_says(type(error)(str(error).removeprefix("layer 0: ")), name)


def test_arguments_in_the_wrong_order() -> None:
    x, w = noise(1, 32, 3), noise(32)
    for op, args, name in (
        (ltxkern.group_norm_silu, (x, 32, w, w), "weight"),
        (ltxkern.group_norm_silu, (32, x, w, w), "x"),
        (ltxkern.group_norm_silu, (w, x, w, 4), "x"),
        (ltxkern.pixel_norm_silu, (1e-8, x), "x"),
        (ltxkern.pixel_norm_silu, (x, w), "eps"),
        (ltxkern.res2s_sde_step, (x, x, x, 0.9, 0.7), "noise"),
        (ltxkern.merge_lora_, (noise(6, 8), noise(6, 2), noise(2, 8)), "lora_a"),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            op(*args)
        assert_says(caught.value, name)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"x0": 1.5}, "x0"),
        ({"x0": [noise(1, 6, 4)]}, "x0"),
        ({"x0": [noise(1, 6, 4), None]}, "x0"),
        ({"latent": {"video": noise(1, 6, 4)}}, "latent"),
        ({"latent": []}, "latent"),
        ({"mask": [noise(1, 6, 1), 1.0], "clean": [noise(1, 6, 4), noise(1, 6, 4)]}, "mask"),
        ({"noise_stats": 1.0}, "noise_stats"),
        ({"out": noise(1, 6, 4)}, "out"),
        ({"out": ([noise(1, 6, 4)], [noise(1, 6, 4)])}, "out"),
        ({"out": ([noise(1, 6, 4)] * 2,)}, "out"),
    ],
    ids=str,
)
def test_lists_of_modalities(given: dict[str, Any], name: str) -> None:
    pair = [noise(1, 6, 4), noise(1, 6, 4)]
    with pytest.raises((TypeError, ValueError)) as caught:
        ltxkern.res2s_midpoint(**{"latent": pair, "x0": pair, "noise": pair, "step": STEP, **given})
    assert_says(caught.value, name)


STATS = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ltxkern.res2s_steps(None), "sigmas"),
        (lambda: ltxkern.res2s_steps(0.9), "sigmas"),
        (lambda: ltxkern.res2s_steps([0.9, "0.7"]), "sigmas"),
        (lambda: ltxkern.res2s_steps([0.9, None]), "sigmas"),
        (lambda: ltxkern.res2s_steps(torch.ones(2, 2)), "sigmas"),
        (lambda: ltxkern.res2s_steps([0.9]), "sigmas"),
        (lambda: ltxkern.res2s_steps([0.7, 0.9]), "sigmas"),
        (lambda: ltxkern.res2s_steps([0.9, math.nan]), "sigmas"),
        (lambda: ltxkern.res2s_steps([0.9, 0.7], eta=None), "eta"),
        (lambda: ltxkern.res2s_steps([0.9, 0.7], eta=math.nan), "eta"),
        (lambda: ltxkern.res2s_steps([0.9, 0.7], eta=-1), "eta"),
        (lambda: ltxkern.res2s_steps([0.9, 0.7], anchor_refinement=1), "anchor_refinement"),
        (lambda: ltxkern.res2s_coefficients("0.5"), "h"),
        (lambda: ltxkern.res2s_coefficients(math.nan), "h"),
        (lambda: ltxkern.res2s_coefficients(0.5, 0.0), "c2"),
        (lambda: ltxkern.res2s_coefficients(0.5, None), "c2"),
        (lambda: ltxkern.sde_coefficients(None), "sigma_next"),
        (lambda: ltxkern.sde_coefficients(math.nan), "sigma_next"),
        (lambda: ltxkern.sde_coefficients(0.5, sigma_up="0.1"), "sigma_up"),
        (lambda: ltxkern.sde_coefficients(0.5, sigma_down=[0.1]), "sigma_down"),
        (lambda: ltxkern.merge_noise_statistics(STATS), "parts"),
        (lambda: ltxkern.merge_noise_statistics([]), "parts"),
        (lambda: ltxkern.merge_noise_statistics(None), "parts"),
        (lambda: ltxkern.merge_noise_statistics([STATS, 1.0]), "parts"),
        (lambda: ltxkern.merge_noise_statistics([STATS, STATS.float()]), "parts"),
        (lambda: ltxkern.merge_noise_statistics([STATS.float()]), "parts"),
        (lambda: ltxkern.merge_noise_statistics([STATS, STATS[:1]]), "parts"),
        (lambda: ltxkern.merge_noise_statistics([STATS[:, :2]]), "parts"),
        (lambda: ltxkern.merge_lora_many_(noise(6, 8), [noise(2, 8)], [noise(6, 2)]), "weights"),
        (lambda: ltxkern.merge_lora_many_([noise(6, 8)], noise(2, 8), [noise(6, 2)]), "lora_a"),
        (lambda: ltxkern.merge_lora_many_([noise(6, 8)], [noise(2, 8)], None), "lora_b"),
        (lambda: ltxkern.merge_lora_(noise(6, 8), {"a": noise(2, 8)}, noise(6, 2)), "lora_a"),
        (lambda: ltxkern.merge_lora_(noise(6, 8), noise(2, 8), noise(6, 2), np.float32), "scale"),
        (lambda: ltxkern.apply_group_norm_silu(1.5, nn.GroupNorm(2, 4), nn.SiLU()), "x"),
        (lambda: ltxkern.apply_group_norm_silu(noise(1, 4, 3), 1e-5, nn.SiLU()), "norm"),
        (lambda: ltxkern.apply_group_norm_silu(noise(1, 4, 3), nn.GroupNorm(2, 4), "silu"), "activation"),
    ],
)
def test_functions_around_the_ops(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert_says(caught.value, name)


def test_numbers_of_numpy_are_numbers() -> None:
    x, w = noise(1, 8, 3), noise(8)
    expected = ltxkern.group_norm_silu(x, w, w, 2, 1e-3)
    assert torch.equal(ltxkern.group_norm_silu(x, w, w, np.int64(2), np.float64(1e-3)), expected)
    assert ltxkern.res2s_steps(np.array([0.9, 0.7])) == ltxkern.res2s_steps([0.9, 0.7])
