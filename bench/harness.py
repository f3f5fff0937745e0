"""Runs a suite: checks every provider against fp64, times all in turn, and puts the floor beside each figure."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import machine
import timing
from cases import CASE_SETS, DTYPES, Call, Case, Suite, clone_args, floor_bytes, needed_bytes, select_cases
from providers import BASELINES, COMPILE, EAGER, Provider, WrongResultError, check, providers_of, reference_of
from report import Record, Results, size, write_json
from timing import CallTimer, Settings, buffer_count, count_launches, interleave, peak_extra, summarise

SHORTEST = 0.1
WARM = "cache not cold: all buffers together fit the last-level cache"


@dataclass
class Budget:
    """Wall time of a whole run, shared evenly by the cases that are still to come: who is quick leaves more to the others."""

    seconds: float
    cases: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds
        self._case_end = self._end

    def left(self) -> float:
        """Seconds until the run should end."""
        return self._end - self.clock()

    def begin_case(self) -> None:
        """One case fewer to come; its share begins now."""
        self._case_end = self.clock() + self.left() / max(1, self.cases)
        self.cases -= 1

    def fit(self, settings: Settings, providers: int) -> Settings:
        """The durations, shortened to what is left of the case's share, to a tenth at most."""
        wanted = settings.milliseconds(providers) / 1e3
        factor = (self._case_end - self.clock()) / wanted if wanted else 1.0
        return settings if factor >= 1 else settings.scaled(max(SHORTEST, factor))


@dataclass
class Run:
    """State of one run: options, machine, and the rows gathered so far."""

    device: torch.device
    settings: Settings
    threads: int
    dtypes: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    check_only: bool = False
    profile_provider: str | None = None
    budget: Budget | None = None
    clocks: machine.ClockSampler | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    roof_values: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    output: Path | None = None

    def keep(self) -> None:
        """Write the rows gathered so far to the output, where there is one."""
        if self.output is not None and self.records:
            write_json(self.results(), self.output)

    def results(self) -> Results:
        """Everything gathered, ready to be written."""
        records = [self.settled(record) for record in self.records]
        facts = self.facts | {"load_at_end": machine.load_average()}
        return Results(facts, self.roof_values, asdict(self.settings), records, self.skipped, self.failures)

    def skip(self, op: str, case: str, provider: str, reason: str) -> None:
        """Note what was left out."""
        self.skipped.append({"op": op, "case": case, "provider": provider, "reason": reason})

    def fail(self, op: str, case: str, error: Exception | str) -> None:
        """Note a wrong result or a crash; exit status 1 follows."""
        words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.failures.append({"op": op, "case": case, "error": words})

    def note_clocks(self) -> None:
        """Start reading the GPU's clocks beside what is measured next, and keep what an earlier reading saw."""
        if self.device.type == "cuda":
            self.clocks = self.clocks or machine.ClockSampler(machine.nvidia_smi_id(self.device))
            self._widen_clocks(self.clocks.poll())

    def end(self) -> None:
        """Wait for the last reading of the clocks."""
        if self.clocks is not None:
            self._widen_clocks(self.clocks.finish())

    def _widen_clocks(self, reading: dict[str, float]) -> None:
        seen = self.facts.setdefault("clocks_seen", {})
        for key, value in reading.items():
            low, high = seen.get(key, (value, value))
            seen[key] = [min(low, value), max(high, value)]

    def measure_copy_roof(self) -> None:
        """Copy once more: a run does before each op, since a host's memory may serve others meanwhile. The best is the roof."""
        rate = timing.copy_roof(self.device, self.settings)
        low, high = self.facts.get("copy_roof_seen", (rate, rate))
        self.facts["copy_roof_seen"] = [min(low, rate), max(high, rate)]
        self.roof_values["copy"] = max(rate, self.roof_values.get("copy", 0.0))

    def settled(self, record: Record) -> Record:
        """The row with its rate and its floor at the roofs of the whole run; a floor that no bytes gave stays.

        The least time: bytes at the copy roof, or FLOP at the roof of the matrix product where those take longer.
        """
        if not record.bytes:
            return record
        if "copy" not in self.roof_values:
            self.measure_copy_roof()
        floor = record.bytes / self.roof_values["copy"] * 1e6
        if record.flops:
            name = f"gemm {record.dtype}"
            if name not in self.roof_values:
                self.roof_values[name] = timing.gemm_roof(self.device, DTYPES[record.dtype], self.settings)
            floor = max(floor, record.flops / self.roof_values[name] * 1e6)
        rate = record.bytes / record.median_us / 1e3
        return replace(record, gb_per_s=rate, floor_us=floor, percent_of_roof=100 * floor / record.median_us)


def count_cases(run: Run, suites: Sequence[Suite], wanted: str) -> int:
    """How many cases and dtypes a run will go through, those refused for want of memory left out."""
    by_name = wanted not in CASE_SETS
    return sum(
        refusal(run, case, dtype, by_name=by_name) is None
        for suite in suites
        for dtype in wanted_dtypes(run, suite)
        for case in select_cases(suite, wanted)
    )


def refusal(run: Run, case: Case, dtype: str, *, by_name: bool) -> str | None:
    """Why a case does not run on this machine, with the bytes it wants, or None."""
    needs = needed_bytes(case, DTYPES[dtype])
    if case.size == "large" and run.device.type != "cuda" and not by_name:
        return f"wants a GPU with {size(needs)} ({needs} bytes) free in {dtype}: no CUDA device here, use --cases small"
    free = machine.free_bytes(run.device)
    if needs > free:
        return f"wants {size(needs)} ({needs} bytes) in {dtype}, {size(free)} are free on {run.device}"
    return None


def run_suite(run: Run, suite: Suite, wanted: str) -> None:
    """Measure the wanted cases of a suite; a wrong result ends the suite, a crash its case, and both are noted as failures.

    Raises:
        ValueError: unknown case or dtype.
    """
    by_name = wanted not in CASE_SETS
    dtypes = wanted_dtypes(run, suite)
    if not dtypes:
        run.skip(suite.op, "all cases", "", f"runs in {', '.join(suite.allowed_dtypes)} only")
    roof_measured = run.check_only
    for dtype in dtypes:
        for case in select_cases(suite, wanted):
            title, reason = f"{case.name} {dtype}", refusal(run, case, dtype, by_name=by_name)
            if reason is None and run.budget is not None and run.budget.left() <= 0:
                reason = f"the time budget of {run.budget.seconds:g} s is spent"
            if reason is not None:
                run.skip(suite.op, title, "", reason)
                continue
            if not roof_measured:
                run.measure_copy_roof()
                roof_measured = True
            if run.budget is not None:
                run.budget.begin_case()
            try:
                run.records += measure_case(run, suite, case, dtype)
                run.keep()
            except WrongResultError as error:
                run.fail(suite.op, title, str(error))
                return
            except torch.OutOfMemoryError as error:
                run.skip(suite.op, title, "", f"out of memory: {str(error).splitlines()[0]}")
            except Exception as error:
                # One broken case must not cost the figures of all others: it is shown, kept, and ends in exit status 1.
                traceback.print_exc(file=sys.stderr)
                run.fail(suite.op, title, error)
            finally:
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()


def wanted_dtypes(run: Run, suite: Suite) -> list[str]:
    """Of the asked-for dtypes those that a suite runs in, or its own.

    Raises:
        ValueError: a dtype that does not exist.
    """
    if run.dtypes is None:
        return list(suite.default_dtypes(run.device))
    unknown = [name for name in run.dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"--dtypes: unknown {', '.join(unknown)}; known are {', '.join(DTYPES)}")
    return [name for name in run.dtypes if name in suite.allowed_dtypes]


@torch.no_grad()
def measure_case(run: Run, suite: Suite, case: Case, dtype: str) -> list[Record]:
    """Check, then time, every provider on one case.

    Raises:
        WrongResultError: a provider of the toolkit is wrong.
    """
    title = f"{case.name} {dtype}"
    call = suite.prepare(case, DTYPES[dtype], run.device, torch.Generator(run.device).manual_seed(0))
    providers, skipped = providers_of(call, run.device, run.backends)
    for skip in skipped:
        if skip.crashed:
            run.fail(suite.op, title, f"{skip.name}: {skip.reason}")
        else:
            run.skip(suite.op, title, skip.name, skip.reason)
    reference = reference_of(call)
    checked, found, compile_s = {}, [], None
    for provider in providers:
        try:
            if provider.name == COMPILE:
                start = time.perf_counter()
                provider.function(*clone_args(call.args))
                compile_s = time.perf_counter() - start
            checked[provider.name] = check(provider.name, call, provider.function, reference, bounded=provider.ours)
            found.append(provider)
        except Exception as error:
            # What another library or the compiler cannot do leaves only that one out.
            if provider.ours or provider.name == EAGER:
                raise
            run.skip(suite.op, title, provider.name, f"{type(error).__name__}: {str(error).strip()[:200]}")
    moved, composed = floor_bytes(call, reference.composed), reference.errors
    del reference
    if run.profile_provider is not None:
        _profile(run, call, found)
    if run.check_only:
        for name, (errors, same) in checked.items():
            kind = "exact" if same else f"rounded, RMS {errors.rms:.2e}, max {errors.maximum:.2e}"
            own = f"torch composition RMS {composed.rms:.2e}, max {composed.maximum:.2e}"
            print(f"{suite.op} {title} {name}: {kind}; {own}")
        return []
    buffers = [call.args, *[clone_args(call.args) for _ in range(buffer_count(moved, run.device) - 1)]]
    timers = {p.name: CallTimer(p.function, buffers, run.device, run.settings) for p in found}
    settings = run.settings if run.budget is None else run.budget.fit(run.settings, len(found))
    samples = interleave(timers, settings.rounds, run.note_clocks, settings)
    load = machine.load_average()
    warm = "" if len(buffers) * moved >= machine.last_level_cache(run.device) else WARM
    rows = []
    for provider in found:
        name = provider.name
        errors, same = checked[name]
        rows.append(
            Record(
                *(suite.op, case.name, list(case.shape), dtype, name),
                **summarise(samples[name]).fields(),
                timer=timers[name].kind,
                buffers=len(buffers),
                bytes=moved,
                flops=call.flops,
                launches=count_launches(provider.function, call.args, run.device),
                peak_extra_bytes=peak_extra(call, provider.function, call.args, run.device),
                error_rms=errors.rms,
                error_max=errors.maximum,
                composition_error_rms=composed.rms,
                bit_equal=same,
                contract=suite.contract if provider.ours else "",
                compile_s=compile_s if name == COMPILE else None,
                load=load,
                note="; ".join(part for part in (timers[name].note, warm) if part),
            )
        )
    return with_ratios(rows)


def with_ratios(rows: list[Record]) -> list[Record]:
    """Rows with each baseline's median over their own."""
    medians = {row.provider: row.median_us for row in rows}
    baselines = [name for name in medians if not name.startswith("ltxkern")]
    ordered = [name for name in BASELINES if name in medians] + [n for n in baselines if n not in BASELINES]
    return [
        replace(row, ratios={name: medians[name] / row.median_us for name in ordered if name != row.provider})
        for row in rows
    ]


def _profile(run: Run, call: Call, found: list[Provider]) -> None:
    """Print the profiler's table of the wanted provider; on a GPU its call lies between cudaProfilerStart and Stop."""
    for provider in found:
        if run.profile_provider not in (provider.name, provider.name.removeprefix("ltxkern ")):
            continue
        on_gpu = run.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        if on_gpu:
            torch.cuda.profiler.start()
        with profile(activities=activities, record_shapes=True) as seen:
            provider.function(*call.args)
            if on_gpu:
                torch.cuda.synchronize(run.device)
        if on_gpu:
            torch.cuda.profiler.stop()
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(f"{provider.name}:\n{seen.key_averages().table(sort_by=order, row_limit=20)}")
