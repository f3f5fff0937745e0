"""One forward of the LTX-2.3 transformer, random weights: diffusers, torch.compile, the toolkit, and the GEMM and attention floor.

diffusers' forward is timed as its pipelines call it, with a timestep for every token, and with the one that all tokens have.
`--count` counts one block of both at the two stages' shapes, from shapes alone: `dit_count.py` says what a video-sized pass is.
`--sites` tells time, bytes and launches of each site of a forward (`dit_sites.py`).
`--blocks N` runs the first N of 48 blocks. The floor replays every matrix product and attention call that the toolkit's
forward makes, on its weights, and nothing else; what the forward takes beyond it is what fusion can win.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from torch import Tensor

import dit_count
import dit_sites
import machine
from cases import CASE_SETS, DTYPES, Case, Suite, named_cases, normal
from command_line import at_least_one, measured, names_of, parser, relaunch_warm, start_run
from dit_floor import ContractionLog, floor_calls
from harness import Run, with_ratios
from ltxkern.patch import fuse
from ltxkern.patching.products import onednn_quicker
from ltxkern.patching.rules import Rules
from ltxkern.pipeline.model.inputs import ModalityInput
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity
from ltxkern.pipeline.sampling.latents import AudioLatentShape, LatentState, VideoLatentShape
from providers import COMPILE, EAGER, WrongResultError, compiler_missing, is_wanted
from report import Record, size, write_whole
from timing import CallTimer, interleave, summarise

# Of one block, in units of the number format; an unrelated result is a distance of 1.4 away. Where fp32 products are of another
# library than diffusers', that is a distance of 9.
ROUNDINGS, ANOTHER_LIBRARY = 8, 12
ONE_TIMESTEP, FLOOR = "torch eager by row", "floor: GEMM and attention alone"
PROVIDERS = (EAGER, ONE_TIMESTEP, COMPILE, "ltxkern")
LEAST_OF = 10  # forwards, in turn, of which a site has the least time
FPS, TEXT_TOKENS, SIGMA = 24.0, 1024, 0.909375
CONFIG = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
    "rope_type": "split",
}
SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "cross_attention_dim": 256,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 128,
}
CASES = (
    Case("small", (2, 6, 10), "small", {"config": SMALL, "blocks": 2, "audio": 18, "text": 64}),
    # By name alone: what two CPU cores hold of the production width.
    Case("wide256", (4, 8, 8), "named", {"config": {}, "blocks": 1, "audio": 16, "text": 256}),
    Case("wide512", (8, 8, 8), "named", {"config": {}, "blocks": 2, "audio": 16, "text": 256}),
    # By its calls alone: tokens and widths that take no time.
    Case("calls", (2, 2, 4), "named", {"config": SMALL, "blocks": 8, "audio": 4, "text": 8}),
    Case("stage1", (16, 17, 30), "large", {"config": {}, "blocks": 48, "audio": 126, "text": TEXT_TOKENS}),
    Case("stage2", (16, 34, 60), "large", {"config": {}, "blocks": 48, "audio": 126, "text": TEXT_TOKENS}),
)


@dataclass(frozen=True)
class Inputs:
    """One forward's inputs, as the toolkit takes them."""

    video: ModalityInput
    audio: ModalityInput


def without_data(case: Case, blocks: int) -> tuple[LTX2Transformer, Any]:
    """The toolkit's transformer and diffusers', on the meta device."""
    arguments = {**CONFIG, **case.options["config"], "num_layers": blocks}
    with torch.device("meta"):
        return LTX2Transformer(**arguments), LTX2VideoTransformer3DModel(**arguments)


def build(case: Case, blocks: int, dtype: torch.dtype, device: torch.device) -> tuple[LTX2Transformer, Any]:
    """The toolkit's transformer with random weights, and diffusers' on the same tensors."""
    ours, theirs = without_data(case, blocks)
    ours = torch.nn.Module.to(ours, dtype=dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in ours.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return ours, theirs.eval()


def inputs_of(case: Case, model: LTX2Transformer, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random tokens and text with true positions."""
    video, audio = VideoLatentShape(*case.shape), AudioLatentShape(case.options["audio"])
    text = case.options["text"]
    if device.type == "meta":
        random = functools.partial(torch.empty, dtype=dtype, device=device)
    else:
        random = normal(dtype, device, torch.Generator(device).manual_seed(1))

    def given(shape: VideoLatentShape | AudioLatentShape, width: int) -> ModalityInput:
        at = LatentState.create(shape, fps=FPS, dtype=dtype, device=device)
        x, context = random(1, shape.tokens, 128), random(1, text, width)
        return ModalityInput(x, SIGMA, None, at.positions, context, coordinates=at.coordinates)

    widths = model.config.cross_attention_dim, model.config.audio_cross_attention_dim
    return Inputs(given(video, widths[0]), given(audio, widths[1]))


def diffusers_forward(model: Any, inputs: Inputs, *, by_token: bool = True) -> Callable[[], Any]:
    """diffusers' forward with per-token timesteps, as its pipelines and the published one call it, or with one timestep."""
    video, audio = inputs.video, inputs.audio
    device = video.latent.device
    sigma = torch.full((1,), SIGMA * 1000, device=device)

    def call() -> Any:
        return model(
            hidden_states=video.latent,
            audio_hidden_states=audio.latent,
            encoder_hidden_states=video.context,
            audio_encoder_hidden_states=audio.context,
            timestep=sigma[:, None].expand(1, video.latent.shape[1] if by_token else 1),
            audio_timestep=sigma[:, None].expand(1, audio.latent.shape[1] if by_token else 1),
            sigma=sigma,
            audio_sigma=sigma,
            video_coords=video.positions,
            audio_coords=audio.positions,
            return_dict=False,
        )

    return call


def counted(case: Case) -> list[dict[str, Any]]:
    """What one block between two others launches and moves in bf16, from shapes alone: ours, diffusers', and that one patched.

    `patch` embeds timesteps for every token once a value, which shapes do not show: it is counted with one for all tokens.
    """
    meta = torch.device("meta")
    ours, theirs = (torch.nn.Module.to(model, dtype=torch.bfloat16).eval() for model in without_data(case, 3))
    inputs = inputs_of(case, ours, torch.bfloat16, meta)

    def row(name: str, model: Any, call: Callable[[], Any]) -> dict[str, Any]:
        return dit_count.count_block(model.transformer_blocks[1], call, case.numel).row(case.name, name)

    rows = [
        row("ltxkern", ours, lambda: predict_velocity(ours, inputs.video, inputs.audio)),
        row("diffusers", theirs, diffusers_forward(theirs, inputs)),
    ]
    with fuse(theirs, Rules(meta=True)):
        patched = diffusers_forward(theirs, inputs, by_token=False)
        patched()  # a site asks at its first call who serves it
        return [*rows, row("patch", theirs, patched)]


@torch.no_grad()
def site_rows(run: Run, case: Case, blocks: int, dtype_name: str) -> list[dict[str, Any]]:
    """What each site of a forward launches, moves and takes; a provider that cannot run is skipped with its reason."""
    dtype, rounds = DTYPES[dtype_name], max(LEAST_OF, run.settings.rounds)
    ours, theirs = build(case, blocks, dtype, run.device)
    inputs = inputs_of(case, ours, dtype, run.device)
    calls: dict[str, Callable[[], Any]] = {
        "ltxkern": lambda: predict_velocity(ours, inputs.video, inputs.audio),
        EAGER: diffusers_forward(theirs, inputs),
        ONE_TIMESTEP: diffusers_forward(theirs, inputs, by_token=False),
    }
    if (reason := compiler_missing(run.device)) is None:
        calls[COMPILE] = diffusers_forward(compile_blocks(case, blocks, dtype, run.device, ours), inputs)
        calls[COMPILE]()
    else:
        run.skip("dit", case.name, COMPILE, reason)
    wanted = {name: call for name, call in calls.items() if is_wanted(name, run.backends)}
    common = {"case": case.name, "blocks": blocks, "dtype": dtype_name, "rounds": rounds}
    return [{**common, **row} for row in dit_sites.site_rows(wanted, COMPILE, run.device, rounds)]


def measure_sites(run: Run, picked: Sequence[Case], parsed: Any) -> int:
    """`--sites`: the table of every case and dtype that fits, printed and as JSON; 2 where none does."""
    rows = []
    for case, blocks, dtype in fitting(run, picked, parsed):
        found = site_rows(run, case, blocks, dtype)
        print(f"{case.name} {dtype}\n{dit_sites.table(found)}\n")
        rows += found
    for one in run.skipped:
        print(f"left out: {' '.join(filter(None, (one['case'], one['provider'])))}: {one['reason']}", file=sys.stderr)
    if parsed.output_json and rows:
        written = {"definition": dit_sites.__doc__, "machine": run.facts, "rows": rows}
        write_whole(written, parsed.output_json)
    return 0 if rows else 2


def weight_bytes(case: Case, blocks: int, dtype: torch.dtype) -> int:
    """What the weights take, and six tensors of the widest activation (per-token modulation) of diffusers' forward."""
    with torch.device("meta"):
        model = LTX2Transformer(**{**CONFIG, **case.options["config"], "num_layers": blocks})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    widest = case.numel * 9 * model.config.num_attention_heads * model.config.attention_head_dim
    return (parameters + 6 * widest) * dtype.itemsize


@torch.no_grad()
def measure(run: Run, case: Case, blocks: int, dtype_name: str, cpu_time: bool) -> None:
    """All providers on one shape; rows go to the run."""
    dtype = DTYPES[dtype_name]
    ours, theirs = build(case, blocks, dtype, run.device)
    inputs = inputs_of(case, ours, dtype, run.device)

    def toolkit() -> Any:
        return predict_velocity(ours, inputs.video, inputs.audio)

    title, theirs_forward = f"{case.name} {blocks} blocks", diffusers_forward(theirs, inputs)
    toolkit()  # attention kernels are checked at their first use, outside the log
    with ContractionLog(ours.parameters()) as log:
        result = toolkit()
    expected = theirs_forward()
    errors = {"ltxkern": distance(result, expected)}
    check_distance("ltxkern", errors["ltxkern"], dtype, blocks)
    wanted = (
        (EAGER, theirs_forward),
        (ONE_TIMESTEP, diffusers_forward(theirs, inputs, by_token=False)),
        ("ltxkern", toolkit),
    )
    functions: dict[str, Callable[[], Any]] = {n: f for n, f in wanted if is_wanted(n, run.backends)}
    functions[FLOOR] = floor_calls(log, run.device)
    compile_s = None
    if is_wanted(COMPILE, run.backends):
        reason = compiler_missing(run.device)
        if reason is None:
            forward = diffusers_forward(compile_blocks(case, blocks, dtype, run.device, ours), inputs)
            start = time.perf_counter()
            try:
                errors[COMPILE] = distance(forward(), expected)
                compile_s, functions[COMPILE] = time.perf_counter() - start, forward
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if reason is not None:
            run.skip("dit", title, COMPILE, reason)
    clock = time.process_time if cpu_time else time.perf_counter
    timers = {name: CallTimer(function, [()], run.device, run.settings, clock) for name, function in functions.items()}
    samples = interleave(timers, run.settings.rounds, run.note_clocks)
    floor = summarise(samples[FLOOR]).median
    common = {"op": "dit", "case": title, "shape": list(case.shape), "dtype": dtype_name, "flops": log.flops}
    notes = {name: f"relative RMS distance from diffusers {error:.1e}" for name, error in errors.items()}
    notes[FLOOR] = f"{len(log.calls)} calls"
    rows = [
        Record(
            **common,
            provider=name,
            **(s := summarise(values)).fields(),
            floor_us=floor * 1e6,
            percent_of_roof=100 * floor / s.median,
            timer="cpu time" if cpu_time else timers[name].kind,
            compile_s=compile_s if name == COMPILE else None,
            note=notes.get(name, ""),
        )
        for name, values in samples.items()
    ]
    run.records += with_ratios(rows)


def distance(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The larger relative RMS distance of the two modalities' velocities."""
    pairs = zip(result, expected, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def check_distance(name: str, found: float, dtype: torch.dtype, blocks: int) -> None:
    """Hold a forward to diffusers' on the same weights; roundings of every block add up like a random walk.

    Raises:
        WrongResultError: further away than `ROUNDINGS` units of the number format in each block explain.
    """
    roundings = ANOTHER_LIBRARY if dtype == torch.float32 and onednn_quicker() else ROUNDINGS
    limit = roundings * torch.finfo(dtype).eps * blocks**0.5
    if not found <= limit:
        raise WrongResultError(f"{name}: relative RMS distance from diffusers is {found:.2e}, allowed {limit:.2e}")


def compile_blocks(case: Case, blocks: int, dtype: torch.dtype, device: torch.device, ours: LTX2Transformer) -> Any:
    """diffusers' model on the same weights with every block compiled; the blocks share one compilation."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**{**CONFIG, **case.options["config"], "num_layers": blocks})
    model.load_state_dict(ours.state_dict(), assign=True)
    for block in model.eval().transformer_blocks:
        block.compile(dynamic=False)
    return model


def fitting(run: Run, picked: Sequence[Case], parsed: Any) -> Iterator[tuple[Case, int, str]]:
    """Case, blocks and dtype of what memory holds, the rest left out; a large one that no GPU is there for only by its name."""
    for case in picked:
        for dtype in run.dtypes or (("bf16",) if run.device.type == "cuda" else ("fp32",)):
            blocks = parsed.blocks or case.options["blocks"]
            needs, free = weight_bytes(case, blocks, DTYPES[dtype]), machine.free_bytes(run.device)
            if needs > free or (case.size == "large" and run.device.type != "cuda" and parsed.cases in CASE_SETS):
                wants = (
                    f"wants {size(needs)} ({needs} bytes) with {blocks} blocks, {size(free)} are free on {run.device}"
                )
                run.skip("dit", f"{case.name} {dtype}", "", f"{wants}: use --cases small, or fewer --blocks")
            else:
                yield case, blocks, dtype


def measure_all(run: Run, picked: Sequence[Case], parsed: Any) -> None:
    """The cases in turn."""
    for case, blocks, dtype in fitting(run, picked, parsed):
        try:
            measure(run, case, blocks, dtype, parsed.cpu_time)
        except WrongResultError as error:
            run.fail("dit", f"{case.name} {dtype}", str(error))
        except torch.OutOfMemoryError as error:
            run.skip("dit", f"{case.name} {dtype}", "", f"out of memory: {str(error).splitlines()[0]}")
        run.keep()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def cases_of(parsed: Any) -> list[Case]:
    """What the options name; with `--count` of the large ones, all where they name a set.

    Raises:
        ValueError: no such name.
    """
    large = [case for case in CASES if case.size == "large"]
    if parsed.cases not in CASE_SETS:
        return named_cases("--count" if parsed.count else "dit", large if parsed.count else CASES, parsed.cases)
    if parsed.count or parsed.cases == "large":
        return large
    return [case for case in CASES if parsed.cases == "all-large" or case.size == "small"]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/bench_dit.py --cases large --blocks 48`."""
    options = parser("One forward of the transformer.")
    options.add_argument("--blocks", type=at_least_one, help="transformer blocks (default: 48, 2 for the small case)")
    options.add_argument(
        "--count", action="store_true", help="count launches and bytes of one block at both stages, and time nothing"
    )
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU: the processor time of this process, where others share its cores; with one thread, or threads that wait count",
    )
    options.add_argument(
        "--sites",
        action="store_true",
        help="time, bytes and launches of each site of a forward, instead of whole forwards",
    )
    parsed = options.parse_args(arguments)
    names_of(options, "--dtypes", parsed.dtypes, Suite.allowed_dtypes)
    names_of(options, "--backends", parsed.backends, PROVIDERS)
    try:
        picked = cases_of(parsed)
    except ValueError as error:
        options.error(str(error))
    if parsed.count:
        rows = [row for case in picked for row in counted(case)]
        print(dit_count.table(rows))
        if parsed.output_json:
            write_whole({"definition": dit_count.__doc__, "rows": rows}, parsed.output_json)
        return 0
    relaunch_warm(parsed)
    run = start_run(parsed)
    if parsed.sites:
        return measure_sites(run, picked, parsed)
    return measured(run, parsed, lambda: measure_all(run, picked, parsed))


if __name__ == "__main__":
    sys.exit(main())
