"""The early pass: one list of all problems, from headers, without the model's code, for every command, in seconds at full size."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ltxkern.cli import main
from ltxkern.pipeline import HQTwoStagePipeline
from ltxkern.pipeline.files import checkpoint
from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.official_names import official_name
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS
from ltxkern.pipeline.model.shapes import expected_shapes
from ltxkern.pipeline.planning.admission import Admission
from tests.commands.typed import MODEL, SIZE, run, write
from tests.official_files import (
    DEMO_SECTIONS,
    PRODUCTION_SECTIONS,
    PRODUCTION_UPSAMPLER,
    write_official,
    write_official_demo,
)
from tests.processes import python

GEMMA = {
    "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    paths = write_official_demo(folder, build_demo())
    paths["lora"] = folder / "lora.safetensors"
    save_file(demo_lora(), paths["lora"])
    return paths


def options(paths: dict[str, Path]) -> list[str]:
    names = {"checkpoint": "model", "upsampler": "upsampler", "text_encoder": "text-encoder", "lora": "distilled-lora"}
    return [item for name, option in names.items() for item in (f"--{option}", str(paths[name]))]


def sentences(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = [line.strip() for line in capsys.readouterr().err.strip().splitlines()]
    assert lines[0].startswith("ltxkern: error: ")
    return [lines[0].removeprefix("ltxkern: error: ")] if len(lines) == 1 else lines[1:]


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "generate": lambda folder: ["generate", "--prompt", "a", *MODEL, "-o", str(folder / "o.mp4")],
    "dry run": lambda folder: ["generate", "--prompt", "a", *MODEL, "--dry-run"],
    "plan": lambda folder: ["plan", *MODEL],
    "batch": lambda folder: ["batch", *MODEL, str(write(folder, {"prompt": "a"})), "-o", str(folder / "results")],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_everything_at_once_before_a_weight_is_read(
    demo_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    tensors = load_file(demo_files["checkpoint"])
    del tensors["model.diffusion_model.proj_out.weight"]
    tensors["vae.decoder.conv_in.conv.bias"] = torch.ones(3)
    lora = {key.replace(".to_q.", ".to_nothing."): tensor for key, tensor in load_file(demo_files["lora"]).items()}
    paths = demo_files | {"lora": tmp_path / "other.safetensors", "upsampler": tmp_path / "cut.safetensors"}
    paths["checkpoint"] = write_official(tmp_path / "odd.safetensors", tensors, DEMO_SECTIONS)
    paths["upsampler"].write_bytes(demo_files["upsampler"].read_bytes()[:-4])
    save_file(lora, paths["lora"])
    monkeypatch.setattr("ltxkern.pipeline.files.checkpoint.load_component", lambda *_: pytest.fail("a weight was read"))
    assert main([*COMMANDS[command](tmp_path), *options(paths), *SIZE]) == 2
    found = sentences(capsys)
    for start, part in (
        (f"--model: {paths['checkpoint']}", "does not fit the transformer; 1 missing: proj_out.weight"),
        (f"--model: {paths['checkpoint']}", "does not fit the video_vae; 1 wrong shape: vae.decoder.conv_in.conv.bias"),
        (f"--upsampler: {paths['upsampler']}", "truncated"),
        (f"--distilled-lora: {paths['lora']}", "to_nothing"),
    ):
        assert [line for line in found if line.startswith(start) and part in line], (start, part, found)
    assert len(found) == 4
    assert not (tmp_path / "o.mp4").exists()


def test_a_lora_may_change_what_is_no_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the loader merges is admitted, as the difference of a norm that LyCORIS stores."""
    norm = {"diffusion_model.transformer_blocks.0.attn1.q_norm.diff": torch.ones(64)}
    save_file(demo_lora() | norm, tmp_path / "lora.safetensors")
    lora = ["--lora", str(tmp_path / "lora.safetensors")]
    assert main([*COMMANDS["dry run"](tmp_path), *SIZE, *lora]) == 0, capsys.readouterr().err
    save_file({key: torch.ones(63) for key in norm}, tmp_path / "lora.safetensors")
    assert main([*COMMANDS["dry run"](tmp_path), *SIZE, *lora]) == 2
    assert "attn1.norm_q (expected (64,), got (63,))" in capsys.readouterr().err


def test_pictures_and_sizes_stand_in_the_same_list(
    demo_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    images = [item for name in ("text.png", "good.png", "none.png") for item in ("--image", str(tmp_path / name))]
    paths = demo_files | {"text_encoder": tmp_path}
    assert main(["generate", "--prompt", "a", "--dry-run", *options(paths), *images, "--height", "1080"]) == 2
    found = sentences(capsys)
    assert [line.split(" ")[0] for line in found] == [
        "--text-encoder:",
        "--text-encoder:",
        "--image:",
        "--image:",
        "height",
    ]
    assert "text.png' is not a picture" in found[2]
    assert "none.png' does not exist" in found[3]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", [["--model", "/nowhere/m.safetensors"], ["--dtype", "bf17"], ["--pipeline", "hp"]])
def test_a_wrong_choice_hides_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, wrong: list[str]
) -> None:
    others = [
        "--lora",
        "/nowhere/l.safetensors:-1",
        "--image",
        "none.png",
        "--device-mode",
        "fast",
        "--vocoder",
        "/no/v",
    ]
    assert main([*COMMANDS[command](tmp_path), *wrong, *others]) == 2
    said = "\n".join(sentences(capsys))
    for part in (
        wrong[1],
        "--lora: there is no file /nowhere/l.safetensors",
        "'none.png' does not exist",
        "'fast'",
        "/no/v",
    ):
        assert part in said, (part, said)


def test_the_demo_brings_its_own_parts(demo_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "--prompt", "a", *MODEL, "--dry-run", *SIZE, *options(demo_files)[2:6]]
    assert main(given) == 2
    assert [line.split(" ")[0] for line in sentences(capsys)] == ["--upsampler:", "--text-encoder:"]


def test_what_a_run_needs_and_nobody_named(
    demo_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_official(tmp_path / "m.safetensors", load_file(demo_files["checkpoint"]), DEMO_SECTIONS)
    asked = ["--model", str(alone), "-o", str(tmp_path / "o.mp4")]
    assert run(*asked) == 2
    found = sentences(capsys)
    assert [line.split(" ")[0] for line in found] == ["--distilled-lora:", "--upsampler:", "--text-encoder:"]
    # A plan and a dry run judge what is named.
    assert run(*asked, "--dry-run") == 0
    encoder = str(demo_files["text_encoder"])
    assert run(*asked, "--pipeline", "one-stage", "--text-encoder", encoder, "--embedding-cache", "off") == 0


def test_parts_in_place_of_a_model(
    demo_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--embedding-cache", "off", "-o", str(tmp_path / "o.safetensors")]
    parts = [f"--transformer={demo_files['checkpoint']}", *options(demo_files)[2:]]
    assert run(*given, *parts) == 0
    latents = load_file(tmp_path / "o.safetensors")
    assert run(*given, *options(demo_files)) == 0
    assert all(torch.equal(tensor, latents[name]) for name, tensor in load_file(tmp_path / "o.safetensors").items())
    capsys.readouterr()
    assert run(*given, *parts, "--video-vae", "/nowhere/v.safetensors", "--vocoder", str(demo_files["lora"])) == 2
    found = sentences(capsys)
    assert found[0] == "--video-vae: there is no file or folder /nowhere/v.safetensors"
    assert found[1].startswith(f"--vocoder: {demo_files['lora']}: holds no tensors of the vocoder")
    assert len(found) == 2
    with pytest.raises(TypeError, match=r"parts: expected some of transformer, .*, got devise"):
        HQTwoStagePipeline.from_pretrained("demo-random", devise="cpu")


def test_a_batch_refuses_its_bad_lines_before_the_first_weight_is_read(
    demo_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = checkpoint.load_component

    def load(*arguments: Any, **keywords: Any) -> Any:
        read.append(len(capsys.readouterr().err.split("image 'none.png' does not exist")))
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "load_component", load)
    prompts = write(tmp_path, {"prompt": "a", "name": "good"}, {"prompt": "b", "image": "none.png", "name": "bad"})
    settings = [*options(demo_files), *SIZE, "--format", "latents", "--embedding-cache", "off"]
    assert main(["batch", str(prompts), "-o", str(tmp_path / "results"), *settings]) == 2
    assert read[0] == 2, "the bad line's sentence was written before"
    assert (tmp_path / "results" / "good.safetensors").exists()


def test_the_pipeline_s_own_door_is_guarded_too(demo_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_encoder: .*not a readable text_encoder"):
        HQTwoStagePipeline.from_pretrained(
            demo_files["checkpoint"], text_encoder=tmp_path, distilled_lora=demo_files["lora"], device="cpu"
        )


def test_a_sentence_is_said_once_and_with_the_caller_s_spelling() -> None:
    admission = Admission(lambda name: f"<{name}>")

    def refuse() -> None:
        raise ValueError("is not there")

    assert admission.attempt("upsampler", refuse) is None
    admission.attempt("model", refuse)
    assert admission.attempt("model", lambda: 5) == 5
    with pytest.raises(CheckpointError, match=r"^<upsampler>: is not there$"):
        admission.close()
    admission.add("", "height is odd")
    with pytest.raises(CheckpointError, match=r"^2 problems:\n  <upsampler>: is not there\n  height is odd$"):
        admission.close()
    Admission().close()


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> Path:
    """A safetensors file of bf16 tensors in its true size, without a byte of weights on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return path


def published_files(folder: Path) -> dict[str, Path]:
    """Files of the 22 B model, its upsampler, Gemma 3 12B and a LoRA of rank 384: 80 GB, and nothing on the disk."""
    shapes = {}
    for component in ("transformer", "connectors", "video_vae", "audio_vae", "vocoder"):
        for name, shape in expected_shapes(component, PRODUCTION_CONFIGS[component]).items():
            shapes[official_name(component, name)] = shape
    shapes["model.diffusion_model.proj_out.weight"] = (128, 4000)
    start = "model.diffusion_model.transformer_blocks."
    linears = {
        key: shape
        for key, shape in shapes.items()
        if key.startswith(start) and len(shape) == 2 and key.endswith(".weight")
    }
    lora: dict[str, tuple[int, ...]] = {}
    for key, (rows, columns) in linears.items():
        module = key.removeprefix("model.").removesuffix(".weight")
        lora |= {f"{module}.lora_A.weight": (384, columns), f"{module}.lora_B.weight": (rows, 384)}
    gemma = folder / "gemma"
    gemma.mkdir()
    width, inner = GEMMA["hidden_size"], GEMMA["intermediate_size"]
    text: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (GEMMA["vocab_size"], width), "norm.weight": (width,)}
    for index in range(GEMMA["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (4096, width), "self_attn.k_proj": (2048, width), "self_attn.v_proj": (2048, width),
            "self_attn.o_proj": (width, 4096), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }  # fmt: skip
        layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (256,))
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        layer |= dict.fromkeys(norms, (width,))
        text |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    sparse(gemma / "model.safetensors", {f"language_model.model.{key}": shape for key, shape in text.items()}, {})
    (gemma / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": GEMMA}))
    vocabulary = {f"token number {number}": number for number in range(262145)}
    merges = [["token", "number"]] * 500_000
    (gemma / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}))
    upsampler = expected_shapes("upsampler", PRODUCTION_CONFIGS["upsampler"])
    return {
        "checkpoint": sparse(folder / "ltx.safetensors", shapes, {"config": json.dumps(PRODUCTION_SECTIONS)}),
        "upsampler": sparse(folder / "x2.safetensors", upsampler, {"config": json.dumps(PRODUCTION_UPSAMPLER)}),
        "text_encoder": gemma,
        "lora": sparse(folder / "lora.safetensors", lora, {}),
    }


def test_seconds_for_the_files_of_the_whole_model(tmp_path: Path) -> None:
    """Files of true size, one shape wrong: the sentence comes within 5 s of processor time, Python's start and torch included."""
    arguments = ["generate", "--prompt", "a", "--dry-run", *options(published_files(tmp_path))]
    code = (
        "import os, sys\nfrom ltxkern.cli import main\n"
        f"status = main({arguments!r})\n"
        "assert status == 2\n"
        "assert not {'diffusers', 'transformers', 'torch._dynamo'} & set(sys.modules)\n"
        "print(sum(os.times()[:2]))\n"
    )
    done = python("-c", code)
    assert done.stderr.strip().count("\n") == 0
    assert "1 wrong shape: model.diffusion_model.proj_out.weight (expected (128, 4096), got (128, 4000))" in done.stderr
    assert float(done.stdout) < 5
