"""The device manager: bit-equal phases in every mode, what each mode may cost, how it is chosen and undone."""

import itertools
import random
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ltxkern.compiled.merge_lora import cpu_has_bfloat16_products
from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.files.lora import NO_LORA, TWO_STAGE_STRENGTHS, LoRA, LoRAFactors, LoRAPhase, lora_phases
from ltxkern.pipeline.files.official_names import lora_module
from ltxkern.pipeline.memory import host_memory, modes, stores
from ltxkern.pipeline.memory.exact_subtraction import bit_pattern
from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError, cgroup_available
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES, OFFLOADED, ModeNeeds, choose_mode
from ltxkern.pipeline.memory.table import CheckpointPristine, LoRAPhaseError, block_of, blocks_of, checksum
from ltxkern.pipeline.planning.meta_trace import AllocationTrace
from tests.pipeline.memory.lora_models import assert_weights, fresh_merges, linear_weights, random_lora, small_model


def demo_with_lora(dtype, seed=0):
    transformer = build_demo(dtype=dtype).transformer
    loras = []
    for number in (seed, seed + 1):
        factors = {}
        for key, tensor in demo_lora(number).items():
            module, kind = lora_module(key)
            factors.setdefault(module, {})[kind] = tensor
        loras.append(LoRA(f"demo {number}", {m: LoRAFactors(f["lora_A"], f["lora_B"]) for m, f in factors.items()}))
    return transformer, loras


def four_phases(distilled, user):
    return [*lora_phases([], distilled), LoRAPhase(((user, 0.7), (distilled, 0.25))), NO_LORA]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_fifty_random_switches_equal_fresh_merges(mode, dtype):
    transformer, (distilled, user) = demo_with_lora(dtype)
    pristine = linear_weights(transformer)
    others = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    phases = four_phases(distilled, user)
    expected = fresh_merges(pristine, phases)
    choose = random.Random(0)
    with TwoStageDeviceManager(mode) as manager:
        manager.attach(transformer)
        manager.prepare(*phases[:2])
        assert manager.mode == mode
        assert manager.phase == phases[0]
        assert_weights(transformer, expected[phases[0]])
        for _ in range(50):
            phase = choose.choice(phases)
            manager.switch_lora_phase(phase)
            assert manager.phase == phase
            assert_weights(transformer, expected[phase])
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, others[name]), name
    assert not transformer._forward_pre_hooks


@pytest.mark.parametrize("mode", MODES)
def test_single_rounding_and_a_second_request_with_other_strengths(mode):
    model = small_model()
    pristine = linear_weights(model)
    distilled, user = random_lora("distilled", model, seed=1), random_lora("user", model, seed=2)
    with TwoStageDeviceManager(mode, rounding="single") as manager:
        manager.attach(model)
        for strengths, users in (((0.25, 0.5), ()), ((0.0, 1.0), ((user, 0.5),)), ((0.3, 0.3), ())):
            phases = lora_phases(users, distilled, strengths)
            expected = fresh_merges(pristine, phases, "single")
            manager.prepare(*phases)
            for phase in (*phases, *phases):
                manager.switch_lora_phase(phase)
                assert_weights(model, expected[phase])
    assert_weights(model, pristine)


@pytest.fixture
def quick_product(monkeypatch):
    """Where the processor has no bf16 products torch's take minutes here: then fp32 ones that are rounded stand for them."""
    if cpu_has_bfloat16_products():
        return
    product = torch.matmul

    def matmul(a, b, **kwargs):
        return (
            product(a.float(), b.float(), **kwargs).to(a.dtype)
            if a.dtype == torch.bfloat16
            else product(a, b, **kwargs)
        )

    monkeypatch.setattr(torch, "matmul", matmul)


def real_layers():
    """Two blocks of one Linear each, 4096 x 4096 and 16384 x 4096 in bf16, and a LoRA of rank 384."""
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([nn.Module(), nn.Module()])
    torch.manual_seed(0)
    factors = {}
    for index, (out_features, in_features) in enumerate(((4096, 4096), (16384, 4096))):
        linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.copy_(torch.randn(linear.weight.shape) * 0.02)
        model.transformer_blocks[index].to_q = linear
        b = (torch.randn(out_features, 384) * (0.05 * 0.02 / 0.25 / 384**0.5)).bfloat16()
        factors[f"transformer_blocks.{index}.to_q"] = LoRAFactors(torch.randn(384, in_features).bfloat16(), b)
    return model, LoRA("distilled", factors)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_product")
def test_three_switches_on_real_layer_shapes_in_every_mode():
    model, lora = real_layers()
    pristine = linear_weights(model)
    phases = lora_phases([], lora)
    expected = fresh_merges(pristine, phases)
    for mode in MODES:
        with TwoStageDeviceManager(mode) as manager:
            manager.attach(model)
            manager.prepare(*phases)
            for phase in (phases[1], phases[0], phases[1]):
                manager.switch_lora_phase(phase)
                assert_weights(model, expected[phase])
            if mode == "inplace":
                assert manager.store.bytes_per_weight <= 0.5
        assert_weights(model, pristine)


@pytest.mark.parametrize("mode", MODES)
def test_forwards_are_identical_across_modes(mode):
    model = small_model(dtype=torch.float32)
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(3))
    expected = {}
    for phase, weights in fresh_merges(linear_weights(model), phases).items():
        merged = small_model(dtype=torch.float32)
        for name, weight in weights.items():
            merged.get_submodule(name).weight.copy_(weight)
        expected[phase] = merged(x)
    with TwoStageDeviceManager(mode) as manager:
        manager.attach(model)
        manager.prepare(*phases)
        for _ in range(2):
            with manager.stage("stage 1", forwards=3):
                for _ in range(3):
                    assert torch.equal(model(x), expected[phases[0]])
            manager.switch_lora_phase(phases[1])
            with manager.stage("stage 2", forwards=1):
                assert torch.equal(model(x), expected[phases[1]])
            manager.switch_lora_phase(phases[0])


def test_the_latents_of_the_whole_pipeline_are_identical_across_modes():
    """And a second run in the same pipeline gives them again."""
    from ltxkern.pipeline.generator import HQTwoStagePipeline

    results = []
    for mode in MODES:
        pipeline = HQTwoStagePipeline.from_pretrained("demo", device="cpu", dtype=torch.float32, device_mode=mode)
        with pipeline:
            for _ in range(2 if mode == "snapshot" else 1):
                size = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}
                results.append(pipeline("a cat", **size, output_type="latents").latents)
            assert pipeline.manager.mode == mode
    for latents in results[1:]:
        assert latents.keys() == results[0].keys()
        for name, latent in latents.items():
            assert torch.equal(latent, results[0][name]), name


def test_more_forwards_than_announced_still_see_their_own_phase():
    model = small_model()
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    pristine = linear_weights(model)
    x = torch.randn(1, 48).bfloat16()
    with TwoStageDeviceManager("snapshot") as manager:
        manager.attach(model)
        manager.prepare(*phases)
        manager.begin_stage("stage 1", forwards=1)
        first = model(x)
        assert manager.phase is None
        assert torch.equal(model(x), first)
        assert_weights(model, fresh_merges(pristine, phases)[phases[0]])


@pytest.mark.parametrize("mode", MODES)
def test_equal_and_empty_phases_are_free(mode, monkeypatch):
    model = small_model()
    lora = random_lora("distilled", model, seed=1)
    merges = []
    for name in ("merge_phase", "merge_phase_beside"):
        monkeypatch.setattr(stores, name, lambda *args, **kwargs: merges.append(1))
    with TwoStageDeviceManager(mode) as manager:
        manager.attach(model)
        manager.prepare(NO_LORA, LoRAPhase(((lora, 0.0),)))
        manager.switch_lora_phase(NO_LORA)
        assert merges == []
        manager.switch_lora_phase(LoRAPhase(((lora, 0.5),)))
        assert len(merges) >= len(lora.factors)


@pytest.mark.parametrize("mode", MODES)
def test_peak_extra_memory_of_a_switch(mode):
    block = 2 * 256 * 512 * 2
    # The trace holds the weights from the start: a switch that replaces them frees what it replaces.
    with AllocationTrace() as trace, TwoStageDeviceManager(mode) as manager:
        model = small_model(width=256, hidden=512, blocks=6)
        phases = lora_phases([], random_lora("distilled", model, seed=1, rank=2))
        weights = sum(w.nbytes for w in linear_weights(model).values())
        manager.attach(model)
        manager.prepare(*phases)
        # What the manager keeps beside one copy, on the device: a second copy, two blocks, a correction, nothing.
        kept = {"resident": weights, "snapshot": 2 * block, "inplace": weights, "original": 0}[mode]
        assert manager.store.extra_device_bytes <= kept
        limit = {"resident": 0, "snapshot": 0, "inplace": 2 * block, "original": block}[mode]
        for phase in (phases[1], phases[0], phases[1]):
            before = trace.peak = trace.live
            manager.switch_lora_phase(phase)
            assert trace.peak - before <= limit + 64 * 1024
            # And a switch leaves nothing behind; both ways take the same.
            assert trace.live == before
        if mode == "inplace":
            assert manager.store.host_bytes == 0


def test_inplace_takes_one_product_where_the_strengths_differ_by_a_power_of_two(monkeypatch):
    model = small_model()
    lora = random_lora("distilled", model, seed=1)
    calls = []

    def counted(real):
        return lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]

    for name in ("merge_phase", "phase_deltas"):
        monkeypatch.setattr(stores, name, counted(getattr(stores, name)))
    for strengths, products in (((0.25, 0.5), 1), ((0.3, 0.7), 2), ((0.5, -0.125), 1)):
        phases = lora_phases([], lora, strengths)
        expected = fresh_merges(linear_weights(model), phases)
        with TwoStageDeviceManager("inplace") as manager:
            manager.attach(model)
            manager.prepare(*phases)
            calls.clear()
            manager.switch_lora_phase(phases[1])
            assert len(calls) == products * len(lora.factors)
            assert_weights(model, expected[phases[1]])


def test_inplace_takes_two_products_where_one_does_not_give_the_bits(monkeypatch):
    model = small_model()
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    expected = fresh_merges(linear_weights(model), phases)
    with TwoStageDeviceManager("inplace") as manager:
        manager.attach(model)
        manager.prepare(*phases)
        monkeypatch.setattr(stores, "binary_ratio", lambda *_: 1.0)
        for phase in (phases[1], phases[0]):
            manager.switch_lora_phase(phase)
            assert_weights(model, expected[phase])


@pytest.mark.parametrize("mode", MODES)
def test_preparing_the_same_phases_again_merges_nothing(mode, monkeypatch):
    model = small_model()
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    with TwoStageDeviceManager(mode) as manager:
        manager.attach(model)
        manager.prepare(*phases)

        def refuse(*_, **__):
            raise AssertionError("merged again")

        with monkeypatch.context() as patch:
            for name in ("merge_phase", "merge_phase_beside", "merge_phase_pair", "phase_deltas"):
                patch.setattr(stores, name, refuse)
            manager.prepare(*phases)
            if mode in ("resident", "snapshot"):
                manager.switch_lora_phase(phases[1])
                manager.prepare(*phases)
        assert manager.phase == phases[0]


def test_inplace_falls_back_where_the_correction_would_be_too_large():
    model = small_model()
    lora = random_lora("violent", model, seed=1, size=2000.0)
    pristine = linear_weights(model)
    phases = lora_phases([], lora)
    expected = fresh_merges(pristine, phases)
    with TwoStageDeviceManager("inplace") as manager:
        manager.attach(model)
        manager.prepare(*phases)
        assert manager.mode == "snapshot"
        assert "bytes per weight" in manager.describe()
        for phase in (phases[1], phases[0]):
            manager.switch_lora_phase(phase)
            assert_weights(model, expected[phase])
    assert_weights(model, pristine)


def test_inplace_falls_back_where_the_product_is_not_repeatable(monkeypatch):
    model = small_model()
    pristine = linear_weights(model)
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    calls = itertools.count()
    real = stores.merge_phase

    def unstable(weight, module, phase, **kwargs):
        real(weight, module, phase, **kwargs)
        if kwargs.get("sign") == -1 and next(calls) % 2:
            bit_pattern(weight)[3] += 1
        return weight

    monkeypatch.setattr(stores, "merge_phase", unstable)
    with TwoStageDeviceManager("inplace") as manager:
        manager.attach(model)
        manager.prepare(*phases)
        assert manager.mode == "snapshot"
        assert "not repeatable" in manager.describe()
        assert_weights(model, fresh_merges(pristine, phases)[phases[0]])
    assert_weights(model, pristine)


def test_a_checkpoint_as_pristine_source_keeps_nothing_on_the_host(tmp_path):
    model = small_model()
    pristine = linear_weights(model)
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    expected = fresh_merges(pristine, phases)
    with TwoStageDeviceManager("original") as manager:
        manager.attach(model, pristine=tmp_path)
        manager.prepare(*phases)
        assert manager.store.host_bytes == 0
        for phase in (phases[1], phases[0], NO_LORA, phases[1]):
            manager.switch_lora_phase(phase)
            assert_weights(model, expected.get(phase, pristine))
    assert_weights(model, pristine)


@pytest.mark.parametrize("rounding", ["reference", "single"])
def test_resident_makes_the_other_phase_from_the_pristine_weights_at_hand(rounding, tmp_path, monkeypatch):
    """Strengths 0 and 1: nothing is read from the files, and one pass makes the second copy."""
    model = small_model()
    pristine = linear_weights(model)
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    lora, user = random_lora("distilled", model, seed=1), random_lora("user", model, seed=2)
    phases = lora_phases([], lora, TWO_STAGE_STRENGTHS)
    third = LoRAPhase(((user, 0.7),))
    expected = fresh_merges(pristine, [*phases, third], rounding)
    with TwoStageDeviceManager("resident", rounding=rounding) as manager:
        manager.attach(model, pristine=tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointPristine, "fetch", lambda *_: pytest.fail("read again"))
            manager.prepare(*phases)
            for phase in (phases[1], phases[0], third):
                manager.switch_lora_phase(phase)
                assert_weights(model, expected[phase])
        manager.switch_lora_phase(NO_LORA)
        model.proj_in.weight[3, 4] += 1
        with pytest.raises(LoRAPhaseError, match=r"proj_in\.weight does not have the bits"):
            manager.switch_lora_phase(phases[1])


def test_the_environment_names_the_mode(monkeypatch):
    monkeypatch.setenv("LTXKERN_DEVICE_MODE", "inplace")
    assert TwoStageDeviceManager().requested_mode == "inplace"
    assert TwoStageDeviceManager("original").requested_mode == "original"
    monkeypatch.setenv("LTXKERN_DEVICE_MODE", "fast")
    with pytest.raises(ValueError, match="mode must be one of auto, resident"):
        TwoStageDeviceManager()


NEEDS = {
    "resident": ModeNeeds("resident", 100, 0),
    "inplace": ModeNeeds("inplace", 70, 0),
    "snapshot": ModeNeeds("snapshot", 60, 80),
    "original": ModeNeeds("original", 50, 40),
}


@pytest.mark.parametrize(
    ("device", "host", "expected"),
    [
        (100, 0, "resident"),
        (99, 0, "inplace"),
        (69, 80, "snapshot"),
        (69, 79, "original"),
        (40, 100, "original"),
    ],
)
def test_auto_takes_the_first_mode_that_fits(device, host, expected):
    mode, reason = choose_mode(NEEDS, device, host)
    assert mode == expected
    assert ("no mode fits" in reason) == (device == 40)


@pytest.mark.parametrize(
    ("device", "host", "begins"), [(20, 60, "chosen: only block"), (19, 60, "no mode"), (20, 59, "no mode")]
)
def test_auto_offloads_where_only_that_fits(device, host, begins):
    mode, reason = choose_mode(NEEDS | {OFFLOADED: ModeNeeds(OFFLOADED, 20, 60)}, device, host)
    assert mode == "original"
    assert reason.startswith(begins)


def test_auto_counts_device_and_host_together_where_they_are_one():
    assert choose_mode(NEEDS, 100, 100, unified=True)[0] == "resident"
    assert choose_mode(NEEDS, 69, 69, unified=True)[1].startswith("no mode fits")


def test_describe_says_what_each_mode_needs(monkeypatch):
    model = small_model()
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    with TwoStageDeviceManager("auto") as manager:
        manager.attach(model)
        manager.prepare(*phases)
        text = manager.describe()
    assert "device mode resident: chosen" in text
    assert all(f"{mode}: " in text for mode in MODES)
    monkeypatch.setattr(modes, "device_available", lambda device: 0)
    with TwoStageDeviceManager("auto") as manager:
        manager.attach(model)
        manager.prepare(*phases)
        assert manager.mode == "original"
        assert "no mode fits" in manager.describe()


def test_close_twice_and_what_comes_before_attach():
    manager = TwoStageDeviceManager("original")
    manager.close()
    with pytest.raises(LoRAPhaseError, match="no transformer is attached"):
        manager.prepare(NO_LORA)
    model = small_model()
    manager.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        manager.attach(model)
    manager.close()
    manager.close()
    manager.attach(model)
    manager.close()


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="meta device"):
        TwoStageDeviceManager("original").attach(model)


def test_one_weight_in_two_modules_cannot_be_patched():
    model = small_model()
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


def test_a_component_without_parameters_or_on_the_device_is_left_alone():
    manager = TwoStageDeviceManager("original")
    for module in (nn.Identity(), nn.Linear(2, 2)):
        with manager.component("part", module) as lent:
            assert lent is module


def test_side_by_side_gives_both_results():
    assert TwoStageDeviceManager("original").side_by_side(lambda: 1, lambda: "a") == (1, "a")


class TestHostMemory:
    def test_a_budget_counts_and_refuses(self):
        budget = HostBudget(100)
        tensor = budget.take(torch.Size([20]), torch.float32, "this")
        with pytest.raises(HostBudgetError, match="that needs 40 bytes of host memory and 20 are left"):
            budget.take(torch.Size([10]), torch.float32, "that")
        budget.give_back(tensor)
        assert budget.available == 100

    def test_without_a_limit_many_small_pieces_leave_a_tenth_free(self, monkeypatch):
        total, taken = 1000, []

        def allocate(shape, dtype):
            taken.append(shape.numel())
            return torch.empty(shape, dtype=dtype)

        monkeypatch.setattr(host_memory, "host_available", lambda: total - sum(taken))
        budget = HostBudget(None, allocate)
        for _ in range(90):
            budget.take(torch.Size([10]), torch.uint8, "a piece")
        with pytest.raises(HostBudgetError, match="and 0 are left"):
            budget.take(torch.Size([10]), torch.uint8, "a piece")
        assert sum(taken) == 900

    def test_page_locked_memory_counts_as_torch_takes_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        budget = HostBudget(1000, lambda shape, dtype: torch.empty(shape, dtype=dtype))
        tensor = budget.take(torch.Size([129]), torch.uint8, "this")
        assert budget.used == 256
        budget.give_back(tensor)
        assert budget.used == 0

    def test_a_host_that_gives_nothing_is_a_budget_error(self):
        def allocate(shape, dtype):
            raise RuntimeError("CUDA error: out of memory\nmore")

        budget = HostBudget(1000, allocate)
        with pytest.raises(HostBudgetError, match=r"the host gave no 4 bytes .CUDA error: out of memory.$"):
            budget.take(torch.Size([1]), torch.float32, "this")
        assert budget.used == 0

    @pytest.mark.parametrize("version", [1, 2])
    def test_control_groups_bound_the_host(self, tmp_path, version):
        membership = tmp_path / "membership"
        if version == 2:
            membership.write_text("0::/a/b\n")
            root, names = tmp_path / "fs", ("memory.max", "memory.current", "inactive_file")
            outer, inner = root / "a", root / "a" / "b"
        else:
            membership.write_text("5:cpu:/x\n4:memory:/a/b\n")
            root, names = tmp_path / "fs", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            outer, inner = root / "memory" / "a", root / "memory" / "a" / "b"
        inner.mkdir(parents=True)
        assert cgroup_available(root, membership) is None
        (inner / names[0]).write_text("max\n" if version == 2 else str(2**63 - 4096))
        (inner / names[1]).write_text("10\n")
        assert cgroup_available(root, membership) is None
        (outer / names[0]).write_text("1000\n")
        (outer / names[1]).write_text("700\n")
        (outer / "memory.stat").write_text(f"anon 5\n{names[2]} 50\n")
        assert cgroup_available(root, membership) == 350
        (inner / names[0]).write_text("100\n")
        assert cgroup_available(root, membership) == 90

    def test_the_host_is_bounded_by_both(self, tmp_path, monkeypatch):
        meminfo = tmp_path / "meminfo"
        meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 40 kB\n")
        monkeypatch.setattr(host_memory, "cgroup_available", lambda: None)
        assert host_memory.host_available(meminfo) == 40 * 1024
        monkeypatch.setattr(host_memory, "cgroup_available", lambda: 77)
        assert host_memory.host_available(meminfo) == 77


def test_the_trace_counts_live_storages_once():
    with AllocationTrace() as trace:
        first = torch.zeros(100)
        view = first[10:]
        assert trace.live == 400
        second = torch.ones(50) + 1
        assert trace.live == 600
        del first
        assert trace.live == 600
        del view, second
        assert trace.live == 0
    assert trace.peak >= 600


def test_a_closed_manager_lets_go_of_the_weights():
    model = small_model()
    manager = TwoStageDeviceManager("resident")
    manager.attach(model)
    manager.prepare(*lora_phases([], random_lora("distilled", model, seed=1)))
    merged = weakref.ref(model.proj_in.weight.data.untyped_storage())
    manager.close()
    assert merged() is None
