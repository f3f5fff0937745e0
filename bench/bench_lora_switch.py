"""Switching the transformer between the LoRA phases of the two stages, in every device mode of TwoStageDeviceManager.

Rows: `prepare` (both phases made ready, first one merged, pristine weights kept on the host where the mode needs them), `switch`
(either direction, in turn). The floor of a switch is one read and one write of the patched weights at the copy roof; a mode that
keeps both phases stays below it. Row `both phases`, with "resident": what of its `prepare` is merging; floor: one read, two writes.

Baselines of the same run, on the same weights and factors, which lie on the device: `matmul + add_` (the delta of the strengths'
difference added in place), `PEFT-style merge` (the old delta subtracted, the new one added), and `dynamic LoRA` (nothing merged,
every Linear adds its product in the forward: no switch, but each forward pays; row `forward`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import machine
from bench_dit import CASES, build, diffusers_forward, inputs_of
from cases import DTYPES, Case
from command_line import finish, parser, relaunch_warm, start_run
from harness import Run, with_ratios
from ltxkern.ops.merge_lora import merge_lora_
from ltxkern.pipeline.files.lora import LoRA, LoRAPhase
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.merge import merge_phase, merge_phase_pair
from report import Record, full_report, size
from timing import CallTimer, interleave, summarise

MODES = ("resident", "snapshot", "inplace", "original")
STRENGTHS = (0.25, 0.5)


def random_lora(model: torch.nn.Module, rank: int) -> LoRA:
    """A LoRA over every Linear of the model, on the host in bf16; its delta is some percent of the weights."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    factors = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        rows, columns = module.weight.shape
        used = min(rank, rows, columns)
        a = torch.randn(used, columns, device=device, generator=generator) * columns**-0.5
        b = torch.randn(rows, used, device=device, generator=generator) * (0.02 * used**-0.5)
        factors[name] = (a.bfloat16().cpu(), b.bfloat16().cpu(), None)
    return LoRA.from_tensors("random", factors)


def linear_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that the LoRA patches."""
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))


def timed(run: Run, action: Any) -> float:
    """Seconds of an action with everything it queued finished."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    start = time.perf_counter()
    action()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - start


def row(
    run: Run, case: str, provider: str, samples: list[float], moved: int, shape: tuple[int, ...], **more: Any
) -> Record:
    """One row from samples in seconds."""
    times = summarise(samples)
    floor = moved / run.copy_roof()
    return Record(
        op="lora_switch",
        case=case,
        shape=list(shape),
        provider=provider,
        **times.fields(),
        bytes=moved,
        gb_per_s=moved / times.median / 1e9,
        floor_us=floor * 1e6,
        percent_of_roof=100 * floor / times.median,
        **more,
    )


def switch_by_difference(weight: Tensor, a: Tensor, b: Tensor, old: float, new: float) -> None:
    """`matmul + add_`."""
    weight.add_(b @ a, alpha=new - old)


def switch_like_peft(weight: Tensor, a: Tensor, b: Tensor, old: float, new: float) -> None:
    """PEFT's unmerge and merge: each takes the delta, scales it, and adds it."""
    weight -= (b @ a) * old
    weight += (b @ a) * new


BASELINES = {"matmul + add_": switch_by_difference, "PEFT-style merge": switch_like_peft}


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """All Linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def on_device(lora: LoRA, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every module, in the model's dtype."""
    return {name: (f.a.to(device, dtype), f.b.to(device, dtype)) for name, f in lora.factors.items()}


@torch.no_grad()
def measure_baseline(run: Run, provider: str, case: Case, blocks: int, rank: int, dtype: str) -> Record:
    """Switches of the whole model back and forth, and how many weights equal a fresh merge after the first."""
    model, _ = build(case, blocks, DTYPES[dtype], run.device)
    modules, change = linears(model), BASELINES[provider]
    factors = on_device(random_lora(model, rank), run.device, DTYPES[dtype])
    probe = max(modules, key=lambda name: modules[name].weight.numel())
    expected = merge_lora_(modules[probe].weight.clone(), *factors[probe], STRENGTHS[1], rounding="reference")
    for name, module in modules.items():
        merge_lora_(module.weight, *factors[name], STRENGTHS[0], rounding="reference")

    def switch(old: float, new: float) -> None:
        for name, module in modules.items():
            change(module.weight, *factors[name], old, new)

    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
    before = torch.cuda.memory_allocated(run.device) if on_gpu else 0
    samples, share = [], 0.0
    for index in range(run.settings.rounds):
        samples.append(timed(run, lambda: switch(*STRENGTHS)))
        if index == 0:
            share = (modules[probe].weight == expected).double().mean().item()
        samples.append(timed(run, lambda: switch(*STRENGTHS[::-1])))
    run.note_clocks()
    return row(
        run,
        f"{case.name} {blocks} blocks rank {rank} switch",
        provider,
        samples,
        2 * linear_bytes(model),
        (blocks, rank),
        dtype=dtype,
        peak_extra_bytes=torch.cuda.max_memory_allocated(run.device) - before if on_gpu else None,
        bit_equal=share == 1.0,
        note=f"{share:.1%} of the largest weight equal a fresh merge after one switch",
    )


def merge_both(weight: Tensor, other: Tensor, module: str, phases: tuple[LoRAPhase, LoRAPhase]) -> None:
    """A copy of the weight, and a merge of one phase into each."""
    other.copy_(weight)
    merge_phase(weight, module, phases[0])
    merge_phase(other, module, phases[1])


BOTH_PHASES = {"copy + two merges": merge_both, "ltxkern dual_add": merge_phase_pair}


@torch.no_grad()
def measure_both_phases(run: Run, case: Case, blocks: int, rank: int, dtype: str) -> list[Record]:
    """Both phases of all weights from pristine ones, as "resident" prepares them; bit-equal to fresh merges."""
    model, twin = build(case, blocks, DTYPES[dtype], run.device)
    del twin
    on_host = random_lora(model, rank)
    factors = on_device(on_host, run.device, DTYPES[dtype])
    lora = LoRA.from_tensors("on the device", {name: (*pair, None) for name, pair in factors.items()})
    phases = LoRAPhase(((lora, STRENGTHS[0]),)), LoRAPhase(((lora, STRENGTHS[1]),))
    modules = linears(model)
    spare = {name: torch.empty_like(module.weight) for name, module in modules.items()}
    probe = max(modules, key=lambda name: modules[name].weight.numel())
    records = []
    for provider, merge in BOTH_PHASES.items():
        weight, other = modules[probe].weight, spare[probe]
        expected = [merge_phase(weight.clone(), probe, phase) for phase in phases]
        merge(weight, other, probe, phases)
        equal = torch.equal(weight, expected[0]) and torch.equal(other, expected[1])
        del expected

        def both(merge: Any = merge) -> None:
            for name, module in modules.items():
                merge(module.weight, spare[name], name, phases)

        samples = [timed(run, both) for _ in range(run.settings.rounds + 1)][1:]
        title, moved = f"{case.name} {blocks} blocks rank {rank} both phases", 3 * linear_bytes(model)
        records.append(row(run, title, provider, samples, moved, (blocks, rank), dtype=dtype, bit_equal=equal))
        run.note_clocks()
    return records


def add_dynamic(
    modules: dict[str, torch.nn.Linear], factors: dict[str, tuple[Tensor, Tensor]], strength: float
) -> list:
    """Hooks by which every Linear adds `strength (x A^T) B^T`."""

    def hook(a: Tensor, b: Tensor) -> Any:
        return lambda module, inputs, output: output + (inputs[0] @ a.t()) @ b.t() * strength

    return [module.register_forward_hook(hook(*factors[name])) for name, module in modules.items()]


@torch.no_grad()
def measure_forwards(run: Run, case: Case, blocks: int, rank: int, dtype: str) -> list[Record]:
    """diffusers' forward with the LoRA as hooks, then with merged weights; both give the same within the dtype's precision."""
    model, twin = build(case, blocks, DTYPES[dtype], run.device)
    inputs = inputs_of(case, model, DTYPES[dtype], run.device)
    factors = on_device(random_lora(model, rank), run.device, DTYPES[dtype])
    del model
    modules, forward = linears(twin), diffusers_forward(twin, inputs)
    title, shape = f"{case.name} {blocks} blocks rank {rank} forward", (blocks, rank)
    plain = forward()[0]
    hooks = add_dynamic(modules, factors, STRENGTHS[1])
    dynamic = CallTimer(forward, [()], run.device, run.settings)
    samples = {"dynamic LoRA": list(interleave({"dynamic": dynamic}, run.settings.rounds, run.note_clocks)["dynamic"])}
    with_hooks = forward()[0]
    for hook in hooks:
        hook.remove()
    for name, module in modules.items():
        merge_lora_(module.weight, *factors[name], STRENGTHS[1], rounding="reference")
    merged = CallTimer(forward, [()], run.device, run.settings)
    samples["merged LoRA"] = list(interleave({"merged": merged}, run.settings.rounds, run.note_clocks)["merged"])
    # The hooks do what a merge does, or the baseline would be none.
    effect = (forward()[0] - plain).double().norm()
    error = (forward()[0] - with_hooks).double().norm() / effect
    floor = summarise(samples["merged LoRA"]).median
    records = []
    for provider, values in samples.items():
        times = summarise(values)
        records.append(
            Record(
                op="lora_switch",
                case=title,
                shape=list(shape),
                dtype=dtype,
                provider=provider,
                **times.fields(),
                timer=dynamic.kind,
                floor_us=floor * 1e6,
                percent_of_roof=100 * floor / times.median,
                note=f"the two differ by {error:.1e} of the LoRA's effect",
            )
        )
    return records


@torch.no_grad()
def measure_mode(run: Run, mode: str, case: Case, blocks: int, rank: int, dtype: str) -> list[Record]:
    """Prepare, then switch back and forth; two switches a round."""
    model, twin = build(case, blocks, DTYPES[dtype], run.device)
    del twin
    lora = random_lora(model, rank)
    first, second = (LoRAPhase(((lora, strength),)) for strength in STRENGTHS)
    title, shape = f"{case.name} {blocks} blocks rank {rank}", (blocks, rank)
    moved = 2 * linear_bytes(model)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    with TwoStageDeviceManager(mode, device=run.device) as manager:
        manager.attach(model)
        prepared = timed(run, lambda: manager.prepare(first, second))
        switches = []
        for _ in range(run.settings.rounds):
            for phase in (second, first):
                # As a run does: the other phase may travel while a stage computes.
                manager.begin_stage("stage", forwards=1)
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                manager.end_stage("stage")
                switches.append(timed(run, lambda p=phase: manager.switch_lora_phase(p)))
        in_force = manager.mode
    peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None
    provider = f"ltxkern {mode}"
    note = "" if in_force == mode else f"fell back to {in_force}"
    more = {"dtype": dtype, "peak_extra_bytes": peak, "contract": "exact", "note": note}
    run.note_clocks()
    return [
        row(run, f"{title} prepare", provider, [prepared], moved, shape, **more),
        row(run, f"{title} switch", provider, switches, moved, shape, **more),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/bench_lora_switch.py --cases large --modes resident,snapshot,inplace,original`."""
    options = parser("Switching LoRA phases.")
    options.add_argument("--blocks", type=int, help="transformer blocks (default: 48, 2 for the small case)")
    options.add_argument("--rank", type=int, help="of the LoRA (default: 384, 16 for the small case)")
    options.add_argument("--modes", default=",".join(MODES))
    options.add_argument("--no-baselines", action="store_true", help="the device modes alone")
    parsed = options.parse_args(arguments)
    if unknown := sorted(set(parsed.modes.split(",")) - set(MODES)):
        options.error(f"--modes: unknown {', '.join(unknown)}; known are {', '.join(MODES)}")
    large = parsed.cases in ("large", "all-large")
    case = next(c for c in CASES if c.name == ("stage1" if large else "small"))
    relaunch_warm(parsed)
    run = start_run(parsed)
    dtype = run.dtypes[0] if run.dtypes else ("bf16" if run.device.type == "cuda" else "fp32")
    blocks, rank = parsed.blocks or case.options["blocks"], parsed.rank or (384 if large else 16)
    needs = 390_000_000 * blocks * DTYPES[dtype].itemsize if large else 0
    if needs > machine.free_bytes(run.device):
        print(
            f"wants {size(needs)} ({needs} bytes) for one copy of the weights, free: {size(machine.free_bytes(run.device))}"
        )
        return 2
    for mode in parsed.modes.split(","):
        copies = 2 if mode == "resident" else 1
        if copies * needs > machine.free_bytes(run.device):
            run.skip(
                "lora_switch", case.name, f"ltxkern {mode}", f"wants {size(copies * needs)} ({copies * needs} bytes)"
            )
            continue
        run.records += measure_mode(run, mode, case, blocks, rank, dtype)
        if mode == "resident":
            run.records += measure_both_phases(run, case, blocks, rank, dtype)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    if not parsed.no_baselines:
        for provider in BASELINES:
            run.records.append(measure_baseline(run, provider, case, blocks, rank, dtype))
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
        run.records += measure_forwards(run, case, blocks, rank, dtype)
    run.records = with_ratios(run.records)
    print(full_report(run.results()))
    return finish(run, parsed)


if __name__ == "__main__":
    sys.exit(main())
