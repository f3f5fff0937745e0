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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import machine
from bench_dit import CASES, build, diffusers_forward, inputs_of
from cases import DTYPES, Case
from command_line import at_least_one, measured, names_of, parser, relaunch_warm, start_run
from harness import Run, with_ratios
from ltxkern.ops.merge_lora import merge_lora_
from ltxkern.pipeline.files.lora import LoRA, LoRAPhase
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.merge import merge_phase, merge_phase_pair
from ltxkern.pipeline.model.transformer import LTX2Transformer
from report import Record, size
from timing import CallTimer, interleave, summarise, synchronize, timed

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


@dataclass(frozen=True)
class Job:
    """What is measured: so many blocks of a model, a LoRA of one rank."""

    run: Run
    case: Case
    blocks: int
    rank: int
    dtype: str

    def models(self) -> tuple[LTX2Transformer, Any]:
        """The toolkit's and diffusers', on the same weights."""
        return build(self.case, self.blocks, DTYPES[self.dtype], self.run.device)

    def row(self, what: str, provider: str, samples: Sequence[float], **more: Any) -> Record:
        """One row from samples in seconds; the clocks are read beside it."""
        self.run.note_clocks()
        title = f"{self.case.name} {self.blocks} blocks rank {self.rank} {what}"
        shape, times = [self.blocks, self.rank], summarise(samples).fields()
        return Record("lora_switch", title, shape, self.dtype, provider, **times, **more)


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
def measure_baseline(job: Job, provider: str) -> Record:
    """Switches of the whole model back and forth, and how many weights equal a fresh merge after the first."""
    run, change = job.run, BASELINES[provider]
    model, _ = job.models()
    modules = linears(model)
    factors = on_device(random_lora(model, job.rank), run.device, DTYPES[job.dtype])
    probe = max(modules, key=lambda name: modules[name].weight.numel())
    expected = merge_lora_(modules[probe].weight.clone(), *factors[probe], STRENGTHS[1], rounding="reference")
    for name, module in modules.items():
        merge_lora_(module.weight, *factors[name], STRENGTHS[0], rounding="reference")

    def switch(old: float, new: float) -> None:
        for name, module in modules.items():
            change(module.weight, *factors[name], old, new)

    on_gpu = run.device.type == "cuda"
    synchronize(run.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    before = torch.cuda.memory_allocated(run.device) if on_gpu else 0
    samples, share = [], 0.0
    for index in range(run.settings.rounds):
        samples.append(timed(lambda: switch(*STRENGTHS), run.device))
        if index == 0:
            share = (modules[probe].weight == expected).double().mean().item()
        samples.append(timed(lambda: switch(*STRENGTHS[::-1]), run.device))
    return job.row(
        "switch",
        provider,
        samples,
        bytes=2 * linear_bytes(model),
        peak_extra_bytes=torch.cuda.max_memory_allocated(run.device) - before if on_gpu else None,
        bit_equal=share == 1.0,
        note=f"{share:.1%} of the largest weight equal a fresh merge after one switch",
    )


def merge_both(weight: Tensor, other: Tensor, module: str, phases: tuple[LoRAPhase, LoRAPhase]) -> None:
    """A copy of the weight, and a merge of one phase into each."""
    other.copy_(weight)
    merge_phase(weight, module, phases[0])
    merge_phase(other, module, phases[1])


BOTH_PHASES = {"copy + two merges": merge_both, "ltxkern merge_phase_pair": merge_phase_pair}


@torch.no_grad()
def measure_both_phases(job: Job) -> list[Record]:
    """Both phases of all weights from pristine ones, as "resident" prepares them; bit-equal to fresh merges."""
    model = job.models()[0]
    factors = on_device(random_lora(model, job.rank), job.run.device, DTYPES[job.dtype])
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

        samples = [timed(both, job.run.device) for _ in range(job.run.settings.rounds + 1)][1:]
        records.append(job.row("both phases", provider, samples, bytes=3 * linear_bytes(model), bit_equal=equal))
    return records


def add_dynamic(
    modules: dict[str, torch.nn.Linear], factors: dict[str, tuple[Tensor, Tensor]], strength: float
) -> list:
    """Hooks by which every Linear adds `strength (x A^T) B^T`."""

    def hook(a: Tensor, b: Tensor) -> Any:
        return lambda module, inputs, output: output + (inputs[0] @ a.t()) @ b.t() * strength

    return [module.register_forward_hook(hook(*factors[name])) for name, module in modules.items()]


@torch.no_grad()
def measure_forwards(job: Job) -> list[Record]:
    """diffusers' forward with the LoRA as hooks, then with merged weights; both give the same within the dtype's precision."""
    run = job.run
    model, twin = job.models()
    inputs = inputs_of(job.case, model, DTYPES[job.dtype], run.device)
    factors = on_device(random_lora(model, job.rank), run.device, DTYPES[job.dtype])
    del model
    modules, forward = linears(twin), diffusers_forward(twin, inputs)

    def sampled() -> tuple[list[float], str]:
        timer = CallTimer(forward, [()], run.device, run.settings)
        return interleave({"": timer}, run.settings.rounds, run.note_clocks)[""], timer.kind

    plain = forward()[0]
    hooks = add_dynamic(modules, factors, STRENGTHS[1])
    dynamic, with_hooks = sampled(), forward()[0]
    for hook in hooks:
        hook.remove()
    for name, module in modules.items():
        merge_lora_(module.weight, *factors[name], STRENGTHS[1], rounding="reference")
    merged = sampled()
    # The hooks do what a merge does, or the baseline would be none.
    error = (forward()[0] - with_hooks).double().norm() / (forward()[0] - plain).double().norm()
    floor = summarise(merged[0]).median
    return [
        job.row(
            "forward",
            provider,
            samples,
            timer=kind,
            floor_us=floor * 1e6,
            percent_of_roof=100 * floor / summarise(samples).median,
            note=f"the two differ by {error:.1e} of the LoRA's effect",
        )
        for provider, (samples, kind) in {"dynamic LoRA": dynamic, "merged LoRA": merged}.items()
    ]


@torch.no_grad()
def measure_mode(job: Job, mode: str) -> list[Record]:
    """Prepare, then switch back and forth; two switches a round."""
    run, model = job.run, job.models()[0]
    lora = random_lora(model, job.rank)
    first, second = (LoRAPhase(((lora, strength),)) for strength in STRENGTHS)
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    with TwoStageDeviceManager(mode, device=run.device) as manager:
        manager.attach(model)
        prepared = timed(lambda: manager.prepare(first, second), run.device)
        switches = []
        for _ in range(run.settings.rounds):
            for phase in (second, first):
                # As a run does: the other phase may travel while a stage computes.
                manager.begin_stage("stage", forwards=1)
                synchronize(run.device)
                manager.end_stage("stage")
                switches.append(timed(lambda p=phase: manager.switch_lora_phase(p), run.device))
        in_force = manager.mode
    more = {
        "bytes": 2 * linear_bytes(model),
        "peak_extra_bytes": torch.cuda.max_memory_allocated(run.device) if on_gpu else None,
        "contract": "exact",
        "note": "" if in_force == mode else f"fell back to {in_force}",
    }
    samples = {"prepare": [prepared], "switch": switches}
    return [job.row(what, f"ltxkern {mode}", taken, **more) for what, taken in samples.items()]


def measure_all(job: Job, modes: Sequence[str], needs: int, *, baselines: bool) -> None:
    """The modes in turn, as far as their copies of so many bytes find room, then what they are compared with."""
    run = job.run
    for mode in modes:
        copies = 2 if mode == "resident" else 1
        if copies * needs > machine.free_bytes(run.device):
            reason = f"wants {size(copies * needs)} ({copies * needs} bytes)"
            run.skip("lora_switch", job.case.name, f"ltxkern {mode}", reason)
            continue
        run.records += measure_mode(job, mode)
        if mode == "resident":
            run.records += measure_both_phases(job)
        run.keep()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    if baselines:
        for provider in BASELINES:
            run.records.append(measure_baseline(job, provider))
            run.keep()
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
        run.records += measure_forwards(job)
    run.records = with_ratios(run.records)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/bench_lora_switch.py --cases large --modes resident,snapshot,inplace,original`."""
    options = parser("Switching LoRA phases.")
    options.add_argument("--blocks", type=at_least_one, help="transformer blocks (default: 48, 2 for the small case)")
    options.add_argument("--rank", type=at_least_one, help="of the LoRA (default: 384, 16 for the small case)")
    options.add_argument("--modes", default=",".join(MODES))
    options.add_argument("--no-baselines", action="store_true", help="the device modes alone")
    parsed = options.parse_args(arguments)
    modes = names_of(options, "--modes", parsed.modes, MODES)
    large = parsed.cases in ("large", "all-large")
    case = next(c for c in CASES if c.name == ("stage1" if large else "small"))
    relaunch_warm(parsed)
    run = start_run(parsed)
    dtype = run.dtypes[0] if run.dtypes else ("bf16" if run.device.type == "cuda" else "fp32")
    blocks, rank = parsed.blocks or case.options["blocks"], parsed.rank or (384 if large else 16)
    needs, free = 390_000_000 * blocks * DTYPES[dtype].itemsize if large else 0, machine.free_bytes(run.device)
    if needs > free:
        print(f"wants {size(needs)} ({needs} bytes) for one copy of the weights, free: {size(free)}")
        return 2
    job = Job(run, case, blocks, rank, dtype)
    return measured(run, parsed, lambda: measure_all(job, modes, needs, baselines=not parsed.no_baselines))


if __name__ == "__main__":
    sys.exit(main())
