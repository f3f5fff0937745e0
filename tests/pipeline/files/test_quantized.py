"""Weights in fp8: every published layout gives scale times value in fp32, rounded once; other quantisations are named."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.checkpoint import CheckpointError, load_component, opened
from ltxkern.pipeline.files.headers import Header, StoredTensor, read_header
from ltxkern.pipeline.files.official_names import TRANSFORMER_PREFIX
from ltxkern.pipeline.files.quantized import dequantised, read_tensor, with_scales
from ltxkern.pipeline.memory.table import CheckpointPristine
from ltxkern.pipeline.model.components import Components
from tests.official_files import DEMO_SECTIONS, write_official

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WEIGHT = "transformer_blocks.0.attn1.to_q"
KEY = TRANSFORMER_PREFIX + WEIGHT
SPELLINGS = (
    "weight_scale", "scale_weight", "weight_scale_inv", "weights_scaling_factor", "weight.scale", "scale", "scales",
    "weight_scales",
)  # fmt: skip
NOT_NEEDED = ("input_scale", "scale_input", "input_amax", "input_quantizer._amax", "output_scale", "k_scale")


def by_loops(value: torch.Tensor, scale: torch.Tensor, blocks: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """One element at a time: its block's number times its value, as fp32, rounded once."""
    result = torch.empty(value.shape, dtype=dtype)
    for row in range(value.shape[0]):
        for column in range(value.shape[1]):
            product = value[row, column].float() * scale[row // blocks[0], column // blocks[1]].float()
            result[row, column] = product.to(dtype)
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([E4M3, E5M2, torch.bfloat16]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_any_block_is_scale_times_value_rounded_once(
    shape: tuple[int, int],
    blocks: tuple[int, int],
    stored: torch.dtype,
    wanted: torch.dtype,
    kind: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator).to(stored)
    sides = [-(-side // block) for side, block in zip(shape, blocks, strict=True)]
    scale = (torch.rand(sides, generator=generator) + 0.01).to(kind)
    assert torch.equal(dequantised(value, scale, blocks, wanted), by_loops(value, scale, blocks, wanted))


# Layout of a scale, as the documentation writes it, with blocks of 16.
LAYOUTS = {
    "tensor": "()",
    "tensor of one": "(1,)",
    "matrix of one": "(1, 1)",
    "row": "(R,)",
    "row, 1": "(R, 1)",
    "column": "(1, C)",
    "column in one dimension": "(C,)",
    "block 16": "(R/b, C/b)",
    "group 16": "(R, C/b, 1)",
    "broadcast": "(R/b, 1, C/b, 1)",
}


def scale_of(layout: str, rows: int, columns: int) -> torch.Tensor:
    sizes = {"R": rows, "C": columns, "R/b": rows // 16, "C/b": columns // 16, "1": 1}
    shape = [sizes[side] for side in LAYOUTS[layout].strip("(),").split(", ") if side]
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) + 0.1


def documented(section: str) -> str:
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    return page.split(f"<!-- {section} -->\n")[1].split("\n<!-- end -->")[0]


def test_the_documentation_lists_the_layouts_and_names_that_are_tested() -> None:
    rows = [f"| {layout} | {shape} |" for layout, shape in {"plain cast": "none", **LAYOUTS}.items()]
    assert documented("scales").splitlines()[2:] == rows
    assert documented("refused").split("; ") == list(dict.fromkeys(name for _, _, name in REFUSED))
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    assert all(f"`x.{spelling}`" in page for spelling in SPELLINGS)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_every_layout_of_a_file(official: dict[str, Path], tmp_path: Path, number: int) -> None:
    """Weights of one block in a layout and a spelling, beside marks that are not needed; the pristine source reads the same."""
    layout, spelling, stored = list(LAYOUTS)[number], SPELLINGS[number % len(SPELLINGS)], (E4M3, E5M2)[number % 2]
    tensors, wanted = load_file(official["checkpoint"]), {}
    for key in [key for key in tensors if ".transformer_blocks.0." in key and key.startswith(TRANSFORMER_PREFIX)]:
        value = tensors[key]
        if not key.endswith(".weight") or value.ndim != 2 or value.shape[0] % 16 or value.shape[1] % 16:
            continue
        scale = scale_of(layout, *value.shape)
        tensors[key] = value.to(stored)
        tensors[key.removesuffix("weight") + spelling] = scale
        tensors[key.removesuffix("weight") + NOT_NEEDED[number % len(NOT_NEEDED)]] = torch.tensor(1.0)
        across = layout == "column in one dimension"
        sides = (
            (1, scale.numel())
            if across
            else (scale.shape[0], math.prod(scale.shape[1:]))
            if scale.ndim > 1
            else (scale.numel(), 1)
        )
        blocks = value.shape[0] // sides[0], value.shape[1] // sides[1]
        wanted[key] = by_loops(tensors[key], scale.reshape(sides), blocks, torch.bfloat16)
    tensors[TRANSFORMER_PREFIX + "scaled_fp8"] = torch.zeros(2, dtype=stored)
    path = write_official(tmp_path / "fp8.safetensors", tensors, DEMO_SECTIONS)
    module = load_component(path, "transformer", dtype=torch.bfloat16)
    pristine = CheckpointPristine(path, torch.bfloat16)
    assert len(wanted) > 10
    for name, parameter in module.state_dict().items():
        if f"{TRANSFORMER_PREFIX}{name}" in wanted:
            assert torch.equal(parameter, wanted[f"{TRANSFORMER_PREFIX}{name}"]), name
            assert torch.equal(pristine.fetch(name.removesuffix(".weight")), parameter), name


def test_a_plain_cast_needs_no_scale_and_a_word_is_said_of_what_is_left_out(
    official: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(official["checkpoint"])
    cast = {key for key in tensors if ".transformer_blocks.1.ff." in key}
    tensors.update({key: tensors[key].to(E4M3) for key in cast})
    tensors[f"{KEY}.input_scale"] = torch.tensor(2.0)
    path = write_official(tmp_path / "cast.safetensors", tensors, DEMO_SECTIONS)
    with caplog.at_level(logging.INFO):
        state = load_component(path, "transformer", dtype=torch.bfloat16).state_dict()
    assert "1 input_scale not needed" in caplog.text
    for key in cast:
        assert torch.equal(state[key.removeprefix(TRANSFORMER_PREFIX)], tensors[key].to(torch.bfloat16))


def header_of(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Header:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
    return read_header(path)


def attached(header: Header, config: dict[str, Any] | None = None) -> dict[str, StoredTensor]:
    return with_scales(header.path, header.tensors, [header], config or {})


def described(content: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


@settings(max_examples=80, deadline=None)
@given(
    sides=st.lists(st.sampled_from([16, 32, 48, 64]), min_size=2, max_size=2, unique=True),
    layout=st.sampled_from(sorted(LAYOUTS)),
    spelling=st.sampled_from(SPELLINGS),
    extra=st.sets(st.sampled_from(NOT_NEEDED)),
    start=st.sampled_from(["", "model.diffusion_model.", "a.b."]),
    listing=st.sampled_from(["none", "list", "list without the start", "marks"]),
    kind=st.sampled_from([E4M3, E5M2]),
    scale_kind=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_layouts_at_random(
    tmp_path_factory: pytest.TempPathFactory,
    sides: list[int],
    layout: str,
    spelling: str,
    extra: set[str],
    start: str,
    listing: str,
    kind: torch.dtype,
    scale_kind: torch.dtype,
) -> None:
    """Any layout, in any spelling, announced in any way: the same product to the bit."""
    rows, columns = sides
    value = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(kind)
    scale = scale_of(layout, rows, columns).to(scale_kind)
    tensors = {f"{start}x.weight": value, f"{start}x.{spelling}": scale, f"{start}y.bias": torch.ones(2)}
    tensors |= {f"{start}x.{name}": torch.ones(1) for name in extra}
    words = {"format": "float8_e4m3fn", "block_size": 16}
    if listing == "marks":
        tensors[f"{start}x.comfy_quant"] = described(words)
    layers = {"layers": {("" if "without" in listing else start) + "x": words}}
    metadata = {"_quantization_metadata": json.dumps(layers)} if "list" in listing else {"block_size": "16"}
    header = header_of(tmp_path_factory.mktemp("random") / "q.safetensors", tensors, metadata)
    found = attached(header)
    assert set(found) == {f"{start}x.weight", f"{start}y.bias"}
    grid = (
        scale.reshape(1, -1)
        if layout == "column in one dimension"
        else scale.reshape(len(scale) if scale.ndim else 1, -1)
    )
    whole = grid.float().repeat_interleave(rows // grid.shape[0], 0).repeat_interleave(columns // grid.shape[1], 1)
    with opened(found.values()) as files:
        result = read_tensor(files, found[f"{start}x.weight"], torch.bfloat16)
    assert torch.equal(result, (value.float() * whole).bfloat16())


INTEGERS = torch.ones(8, 8, dtype=torch.int8)


REFUSED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"a.weight": INTEGERS, "a.weight_scale": torch.ones(1)}, {}, "int8"),
    ({"a.weight": INTEGERS, "a.SCB": torch.ones(8)}, {}, "int8 (bitsandbytes)"),
    ({"a.weight": INTEGERS, "a.comfy_quant": described({"format": "int8_tensorwise"})}, {}, "int8_tensorwise"),
    ({"a.weight": INTEGERS.byte(), "a.weight.quant_state.bitsandbytes__nf4": INTEGERS.byte()}, {}, "nf4 (bitsandbytes)"),
    ({"a.weight": INTEGERS.byte(), "a.weight.absmax": torch.ones(8)}, {}, "4 bit (bitsandbytes)"),
    ({"a.weight": INTEGERS.byte(), "a.weight_scale": torch.ones(1), "a.weight_scale_2": torch.ones(1)}, {}, "nvfp4"),
    ({"a.qweight": INTEGERS.int(), "a.scales": torch.ones(8)}, {}, "GPTQ or AWQ"),
    ({"a.qweight": INTEGERS, "a.wscales": torch.ones(8)}, {}, "SVDQuant (nunchaku)"),
    ({"a.weight._data": INTEGERS, "a.weight._scale": torch.ones(8)}, {}, "quanto"),
    ({"a.weight": torch.ones(8, 8)}, {"_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}'}, "nvfp4"),
    ({"a.weight": torch.ones(8, 8)}, {"_quantization_metadata": '{"layers": {"a": {"format": "mxfp8"}}}'}, "mxfp8"),
    ({"a.weight": torch.ones(8, 8).to(E4M3), "a.weight_scale": torch.ones(8, 1).to(torch.float8_e8m0fnu)}, {}, "mxfp8"),
    ({"a.weight": torch.ones(8, 8).to(E4M3), "a.weight_scale": INTEGERS.byte()[:1]}, {}, "mxfp8"),
    ({"a.weight": torch.ones(8, 8).to(E4M3), "a.comfy_quant": described({"format": "mxfp8"})}, {}, "mxfp8"),
    ({"a.weight": INTEGERS.int()}, {}, "packed integers"),
    ({"a._weight_qdata": INTEGERS, "a._weight_scale": torch.ones(8)}, {}, "torchao"),
    ({"a.weight": torch.ones(8, 8).to(E4M3), "a.weight_scale": torch.ones(1),
      "a.comfy_quant": described({"format": "float8_e4m3fn", "convrot": True})}, {}, "float8_e4m3fn with convrot"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "metadata", "name"), REFUSED)
def test_another_quantisation_is_named(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str], name: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        attached(header_of(tmp_path / "q.safetensors", tensors, metadata))
    assert f"q.safetensors: its weights are quantised as {name}, which is not read here" in str(error.value)


def test_marks_of_fp8_in_the_metadata_are_understood(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(96, 8).to(E4M3),
        "a.weight_scale": torch.rand(2, 1),
        "a.comfy_quant": described({"format": "float8_e4m3fn"}),
    }
    layers = {"layers": {"a": {"format": "float8_e4m3fn_blockwise", "block_size": 64}}}
    header = header_of(tmp_path / "q.safetensors", tensors, {"_quantization_metadata": json.dumps(layers)})
    (found,) = attached(header).values()
    assert found.blocks == (64, 8)
    header = header_of(tmp_path / "r.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"blocks of the scale a\.weight_scale .* cannot be told"):
        attached(header)  # 48 or 64
    (found,) = attached(header, {"quantization_config": {"weight_block_size": [48, 8]}}).values()
    assert found.blocks == (48, 8)


def test_two_announced_sides_are_rows_and_columns(tmp_path: Path) -> None:
    """Where both sizes fit both sides, their order decides; two announcements that both fit decide nothing."""
    tensors = {"a.weight": torch.ones(96, 96).to(E4M3), "a.weight_scale": torch.rand(2, 2)}
    header = header_of(tmp_path / "q.safetensors", tensors)
    for sizes in ([48, 64], [64, 48], [64], [48, 48]):
        found = attached(header, {"quantization_config": {"weight_block_size": sizes}})["a.weight"]
        assert found.blocks == (sizes[0], sizes[-1])
    with pytest.raises(CheckpointError, match="cannot be told"):
        attached(header, {"quantization_config": {"a": {"group_size": 48}, "b": {"group_size": 64}}})


def test_the_usual_block_is_128_even_where_it_does_not_divide_the_side(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(192, 300).to(E4M3), "a.weight_scale_inv": torch.rand(2, 3)}
    assert attached(header_of(tmp_path / "q.safetensors", tensors))["a.weight"].blocks == (128, 128)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"a.weight_scale": torch.ones(3)}, r"does not fit a\.weight \(8, 4\): expected one number, one per row"),
        ({"a.weight_scale": torch.ones(32)}, "does not fit"),
        ({"a.weight_scale": torch.ones(2, 2, 2)}, "does not fit"),
        ({"a.weight_scale": torch.ones(())[None][:0]}, "does not fit"),
        ({"a.weight_scale": torch.ones(1, dtype=torch.int32)}, "does not fit"),
        ({"a.weight_scale": torch.ones(9, 4)}, "cannot be told"),
        (
            {"a.weight_scale": torch.ones(1), "a.scale_weight": torch.ones(1)},
            "has 2 scales, a.scale_weight, a.weight_scale",
        ),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(tmp_path: Path, scales: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        attached(header_of(tmp_path / "q.safetensors", {"a.weight": torch.ones(8, 4).to(E4M3), **scales}))


def test_a_scale_without_a_weight_is_an_unexpected_key(
    demo: Components, official: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(official["checkpoint"])
    tensors[f"{TRANSFORMER_PREFIX}nothing.weight_scale"] = torch.ones(1)
    path = write_official(tmp_path / "q.safetensors", tensors, DEMO_SECTIONS)
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.diffusion_model\.nothing\.weight_scale"):
        load_component(path, "transformer")


FP8 = torch.ones(4, 4).to(E4M3)
LAYER = {"format": "float8_e4m3fn"}
LIST = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.a": LAYER}})}
SCALED = {"m.blocks.1.a.weight": FP8, "m.blocks.1.a.weight_scale": torch.ones(1)}
# Beside an fp8 matrix m.blocks.0.a without a scale: tensors, metadata, and what is said; None: it is taken as it is.
UNSCALED: list[tuple[dict[str, torch.Tensor], dict[str, str], str | None]] = [
    ({}, {}, None),
    ({"m.norm.weight": torch.ones(4).to(E4M3)}, {}, None),
    ({"m.other.weight": FP8, "m.other.weight_scale": torch.ones(1)}, {}, None),
    (SCALED, {"_quantization_metadata": json.dumps({"layers": {"blocks.1.a": LAYER}})}, None),
    (SCALED | {"m.blocks.1.a.comfy_quant": described(LAYER)}, {}, None),
    (SCALED, {}, r"1 fp8 weights have no scale: m\.blocks\.0\.a\.weight"),
    ({"m.scaled_fp8": torch.ones(1)}, {}, r"1 fp8 weights have no scale: m\.blocks\.0\.a\.weight"),
    ({"other.scaled_fp8": torch.ones(1)}, {}, None),
    ({}, LIST, r"m\.blocks\.0\.a\.weight was stored as float8 .*expected m\.blocks\.0\.a\.weight_scale"),
    (SCALED, LIST, r"m\.blocks\.0\.a\.weight was stored as float8"),
    ({}, {"_quantization_metadata": '{"layers": {"m.blocks.0.a": "float8_e4m3fn"}}'}, "was stored as float8"),
    ({"m.blocks.0.a.comfy_quant": described(LAYER)}, {}, "was stored as float8"),
    ({"m.blocks.0.a.comfy_quant": described(LAYER), "m.blocks.0.a.weight_scale": torch.ones(1)}, {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "metadata", "message"), UNSCALED)
def test_fp8_without_a_scale_is_a_plain_cast_or_has_lost_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str | None
) -> None:
    header = header_of(tmp_path / "q.safetensors", {"m.blocks.0.a.weight": FP8} | tensors, metadata)
    if message is None:
        assert "m.blocks.0.a.weight" in attached(header)
    else:
        with pytest.raises(CheckpointError, match=f"q.safetensors: .*{message}"):
            attached(header)


def test_plain_fp8_beside_scaled_fp8_is_taken_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attached(header_of(tmp_path / "q.safetensors", {"b.weight": FP8, "b.weight_scale": torch.ones(1), "a.weight": FP8}))
    assert "1 fp8 weights have no scale and are taken as they are: a.weight" in caplog.text


@pytest.mark.parametrize(
    ("numbers", "value", "word"),
    [
        (math.nan, 1.0, "nan"), (math.inf, 1.0, "inf"), (-math.inf, 1.0, "-inf"), (-1.0, 1.0, "-1"), (0.0, 1.0, "0"),
        (-1.0, 0.0, "-1"), (math.nan, 0.0, "nan"), (0.0, 0.0, None),
    ],
)  # fmt: skip
def test_what_no_scale_can_be_is_refused_by_key(tmp_path: Path, numbers: float, value: float, word: str | None) -> None:
    """A zero says something only of a row that is zero itself."""
    tensors = {"a.weight": torch.ones(3, 4), "a.weight_scale": torch.ones(3)}
    tensors["a.weight"][1], tensors["a.weight_scale"][1] = value, numbers
    tensors["a.weight"] = tensors["a.weight"].to(E4M3)
    stored = attached(header_of(tmp_path / "q.safetensors", tensors))["a.weight"]
    with opened([stored]) as files:
        if word is None:
            assert torch.equal(read_tensor(files, stored, torch.float32), tensors["a.weight"].float())
        else:
            with pytest.raises(CheckpointError, match=rf"q.safetensors: the scale a\.weight_scale holds {word} \(1 of"):
                read_tensor(files, stored, torch.float32)


def test_one_dimension_is_rows_or_columns_as_the_other_weights_or_the_format_say(tmp_path: Path) -> None:
    square = {"a.weight": FP8, "a.weight_scale": torch.ones(4)}
    header = header_of(tmp_path / "q.safetensors", square)
    with pytest.raises(CheckpointError, match=r"one number per row .* or one per column"):
        attached(header)
    for rows, columns, blocks in ((8, 4, (1, 4)), (4, 8, (4, 1))):
        wide = {"b.weight": torch.ones(rows, columns).to(E4M3), "b.weight_scale": torch.ones(8)}
        found = attached(header_of(tmp_path / f"{rows}.safetensors", square | wide))
        assert found["a.weight"].blocks == blocks
    named = square | {"a.comfy_quant": described({"format": "float8_e4m3fn_rowwise"})}
    assert attached(header_of(tmp_path / "n.safetensors", named))["a.weight"].blocks == (1, 4)
    norm = {"n.weight": torch.ones(4), "n.scale": torch.ones(4)}  # a name of its own where nothing is fp8
    assert set(attached(header_of(tmp_path / "p.safetensors", norm))) == set(norm)
