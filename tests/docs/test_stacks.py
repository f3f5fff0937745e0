"""The recipes of the pages about other stacks, run as they stand there: sites are fused and given back, a pack comes and goes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.documents import ALL, ROOT, blocks
from tests.docs.stacks import STACKS, SURROUNDINGS
from tests.integrations.comfy import stand_in

PACK = ROOT / "integrations" / "comfyui" / "README.md"
# What a recipe prints: its receipt.
PRINTED = {
    "diffusers": ["transformer.transformer_blocks.0", "vae.decoder", "pixel_norm_silu", "qk_norm_rope"],
    "sglang": ["apply_group_norm_silu: ltxkern.group_norm_silu"],
    "official": [".ada_zero_function: ltxkern.rms_norm_modulate", "attn1.preattention_function: ltxkern.qk_norm_rope"],
    "pytorch": ["group_norm_silu", "rounded"],
    "kernels": [],
}


def recipes(page: str) -> list[str]:
    return [block.text for block in ALL if block.path == STACKS / f"{page}.md"]


def test_every_page_has_a_short_recipe() -> None:
    assert {path.stem for path in STACKS.glob("*.md")} - {"index"} == SURROUNDINGS.keys() == PRINTED.keys()
    for page in SURROUNDINGS:
        lengths = [len([line for line in text.splitlines() if line.strip()]) for text in recipes(page)]
        assert lengths, page
        assert max(lengths) <= 5, page


def kept(names: dict[str, Any]) -> dict[str, Any]:
    """What a recipe may change: classes of modules and functions that they hold, and functions of a stack's own modules."""
    holder = names.get("pipe", names.get("model"))
    components = getattr(holder, "components", {"": holder})
    parts = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    objects: dict[str, Any] = {
        f"{name}.{path}": one for name, part in parts.items() for path, one in part.named_modules()
    }
    objects |= {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "sglang"}
    return {
        name: (type(one), {held: value for held, value in vars(one).items() if callable(value)})
        for name, one in objects.items()
    }


@pytest.mark.parametrize("page", PRINTED)
def test_recipe_runs_as_written(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng(), SURROUNDINGS[page](tmp_path) as names:
        before = kept(names)
        recipe, *others = recipes(page)
        exec(recipe, names)
        out = capsys.readouterr().out
        assert [text for text in PRINTED[page] if text not in out] == []
        if page == "kernels":
            assert names["model"].forward.__func__.__module__ == "ltxkern.integrations.kernels"
        else:
            # A recipe may load more of a stack's modules.
            after = kept(names)
            assert {name: after[name] for name in before} == before
        for text in others:
            exec(text, names)
        if page == "kernels":
            assert names["model"].forward.__func__ is type(names["model"]).forward
        if page == "diffusers":
            assert type(names["pipe"].scheduler).__name__ == "Res2sScheduler"


def test_the_pack_of_nodes_is_copied_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = tmp_path / "custom_nodes" / "ltxkern"
    pack.parent.mkdir()
    for name, module in stand_in.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    copy, remove = (block.text for block in blocks(PACK) if block.language == "sh")
    environment = {"COMFYUI": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", "-ec", copy], cwd=ROOT, env=environment, check=True)
    _, titles = stand_in.load_custom_node(str(pack))
    rows = PACK.read_text()
    assert [title for title in titles.values() if f"| {title.removesuffix(' (ltxkern)')} |" not in rows] == []
    subprocess.run(["sh", "-ec", remove], cwd=ROOT, env=environment, check=True)
    assert not pack.exists()
