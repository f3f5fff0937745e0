"""`ltxkern lora`: what it tells about a file, and whether the file fits."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.cli import main
from ltxkern.pipeline.files.lora_layout import LAYOUTS

K = "transformer_blocks.0.attn1.to_k"


def test_it_tells_layout_rank_alpha_modules_training_and_fit(tmp_path, capsys):
    path = tmp_path / "mine.safetensors"
    tensors = {f"lora_unet_{K.replace('.', '_')}.lora_down.weight": torch.zeros(4, 64)}
    tensors |= {
        f"lora_unet_{K.replace('.', '_')}.lora_up.weight": torch.zeros(64, 4),
        "lora_te1_x.alpha": torch.zeros(()),
    }
    metadata = {
        "ss_network_alpha": "2",
        "ss_base_model_version": "ltx2.3",
        "modelspec.architecture": json.dumps({"a": 1}),
    }
    save_file(tensors, path, metadata)
    assert main(["lora", str(path), "--model", "demo-random"]) == 0
    said = capsys.readouterr().out
    for line in (
        f"layout: kohya, musubi-tuner; lora_unet_{K.replace('.', '_')}.lora_down.weight",
        "changes: low-rank x 1",
        "rank: 4 x 1",
        "alpha: 2 x 1; told by its header",
        "modules: 1: transformer_blocks.N.attn1.to_k x 1",
        "left out: 1 keys",
        "trained on: ss_base_model_version ltx2.3",
        "fits demo-random: yes",
    ):
        assert line in said


def test_a_file_that_does_not_fit_is_told_so(tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_file({f"transformer.{K}.lora_{half}.weight": torch.zeros(3, 3) for half in "AB"}, path)
    assert main(["lora", str(path), "--model", "demo-random"]) == 2
    said = capsys.readouterr().out
    assert "alpha: none x 1; told by nothing, so the scale is 1" in said
    assert "trained on: not told" in said
    assert f"fits demo-random: no; 1 of the wrong shape: {K} (expected (64, 64), got (3, 3))" in said


def test_it_lists_the_layouts_of_the_table(capsys):
    assert main(["lora", "--layouts"]) == 0
    said = capsys.readouterr().out
    assert all(layout.writer in said for layout in LAYOUTS)
    assert main(["lora"]) == 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.writer)
def test_it_knows_every_layout_of_the_table(tmp_path, capsys, layout):
    # A module whose official and diffusers names differ.
    name = {"official": "adaln_single.linear", "diffusers": "time_embed.linear"}.get(
        layout.names, "adaln_single_linear"
    )
    a, b, _ = layout.keys(name)
    save_file({a: torch.zeros(2, 64), b: torch.zeros(576, 2)}, tmp_path / "lora.safetensors")
    assert main(["lora", str(tmp_path / "lora.safetensors"), "--model", "demo-random"]) == 0
    assert layout.writer in capsys.readouterr().out.splitlines()[1]


def test_it_imports_no_model_library(tmp_path):
    path = tmp_path / "lora.safetensors"
    k = f"lora_unet_{K.replace('.', '_')}"
    save_file({f"{k}.lora_down.weight": torch.zeros(4, 4096), f"{k}.lora_up.weight": torch.zeros(4096, 4)}, path)
    code = (
        "import sys\nfrom ltxkern.cli import main\nfile = sys.argv[1]\n"
        "assert main(['lora', file]) == 0\nassert main(['lora', file, '--model', 'demo-random']) == 2\n"
        "assert not {'diffusers', 'transformers', 'triton'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
