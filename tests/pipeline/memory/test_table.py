"""The table of patched weights: blocks, checksums that see any other bit, pristine sources."""

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.lora import NO_LORA, lora_phases
from ltxkern.pipeline.memory.inplace import bit_pattern
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.table import LoRAPhaseError, block_of, blocks_of, checksum
from tests.pipeline.memory.lora_models import assert_weights, prepared, random_lora


def test_a_checkpoint_as_pristine_source_keeps_nothing_on_the_host(model, pristine, phases, expected, tmp_path):
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    with prepared(model, phases, "original", pristine=tmp_path) as manager:
        assert manager.store.host_bytes == 0
        for phase in (phases[1], phases[0], NO_LORA, phases[1]):
            manager.switch_lora_phase(phase)
            assert_weights(model, expected.get(phase, pristine))
    assert_weights(model, pristine)


def test_one_weight_in_two_modules_cannot_be_patched(model):
    model.transformer_blocks[1][0].weight = model.transformer_blocks[0][0].weight
    with TwoStageDeviceManager("original") as manager:
        manager.attach(model)
        with pytest.raises(ValueError, match="share one weight"):
            manager.prepare(*lora_phases([], random_lora("distilled", model, seed=1)))
        assert manager.phase == NO_LORA


def test_blocks_are_ordered_outer_first_and_by_number():
    names = [
        "transformer_blocks.10.a",
        "transformer_blocks.2.b.c",
        "proj_in",
        "time_embed.linear",
        "transformer_blocks.2.a",
    ]
    assert list(blocks_of(names)) == ["outer", "transformer_blocks.2", "transformer_blocks.10"]
    assert blocks_of(names)["transformer_blocks.2"] == ("transformer_blocks.2.a", "transformer_blocks.2.b.c")
    assert block_of("a.layers.3.x") == "a.layers.3"


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (7, 64), (64, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_sees_single_bits_and_swapped_rows(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    assert torch.equal(checksum(tensor), checksum(tensor.clone()))
    if tensor.numel():
        changed = tensor.clone()
        bit_pattern(changed)[-1] ^= 1
        assert not torch.equal(checksum(tensor), checksum(changed))
    if shape == (64, 1024):
        assert not torch.equal(checksum(tensor), checksum(tensor.flip(0)))
    assert torch.equal(checksum(tensor.t().contiguous().t()), checksum(tensor))


@pytest.mark.parametrize(
    ("block", "module"), [("outer", "proj_in"), ("transformer_blocks.1", "transformer_blocks.1.0")]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_changed_by_someone_else_is_noticed(model, phases, mode, block, module):
    with prepared(model, phases, mode) as manager:
        before = manager.block_checksums()
        model.get_submodule(module).weight[3, 4] += 1
        after = manager.block_checksums()
        assert [name for name in before if before[name] != after[name]] == [block]
        if mode == "inplace":
            # No other copy: the switch must refuse, and the model must not run.
            with pytest.raises(LoRAPhaseError, match=f"{module}.weight does not have the bits"):
                manager.switch_lora_phase(phases[1])
            assert manager.phase is None
            with pytest.raises(LoRAPhaseError, match="between two LoRA phases"):
                model(torch.randn(1, 48).bfloat16())
            with pytest.raises(LoRAPhaseError, match="does not have the bits"):
                manager.close()


@pytest.mark.parametrize("mode", MODES)
def test_checksums_agree_with_fresh_merges(model, phases, mode):
    with prepared(model, phases, "original") as manager:
        expected = {}
        for phase in phases:
            manager.switch_lora_phase(phase)
            expected[phase] = manager.block_checksums()
    with prepared(model, phases, mode) as manager:
        for phase in (*phases, *phases):
            manager.switch_lora_phase(phase)
            assert manager.block_checksums() == expected[phase]
