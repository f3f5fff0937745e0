"""`ltxkern batch`: many prompts from a JSON-lines file into a folder; resumable, on one process, a CFG group, or many with Ray."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ltxkern.commands import admission, generate, options, parallel, work_dir
from ltxkern.commands.text_files import home_in_paths

if TYPE_CHECKING:
    from ltxkern.commands.batching.items import Item, Manifest, Outcome
    from ltxkern.commands.batching.ray import Placement
    from ltxkern.pipeline.parallel.by_branch import CFGParallel
    from ltxkern.pipeline.run.request import GenerationRequest

FORMATS = {"mp4": ".mp4", "latents": ".safetensors", "frames": "/"}
# What no result depends on; a CFG group gives the bits of one process.
_OUTPUT_ONLY = (*parallel.OWN_AFFAIR, "prompts", "ray", "workers", "cfg_parallel_size", "work_dir", "no_work_dir")
_OF_BATCHES = ("prompts", "format", "ray", "workers")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "batch",
        help="make many videos from a file of prompts",
        description='Each line of the file is an object such as {"prompt": "...", "seed": 3, "name": "kite"}; any option under '
        '"what to generate" and "guidance" may stand there and wins over the command line. Run it again to go on where it stopped.',
    )
    parser.add_argument("prompts", metavar="FILE.jsonl", help="one JSON object per line")
    parser.add_argument("-o", "--output", default="batch", metavar="FOLDER", help="where results go (default batch)")
    parser.add_argument("--format", default="mp4", help="mp4 (default), latents or frames")
    parser.add_argument(
        "--ray", action="store_true", help='spread over the GPUs of a Ray cluster (pip install "ltxkern[ray]")'
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="Ray: groups that work side by side (default: all GPUs)"
    )
    options.add_request_options(parser)
    options.add_model_options(parser)
    parallel.add_parallel_options(parser)
    work_dir.add_work_options(parser)
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    parser.add_argument("--quiet", action="store_true", help="no line per item")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Run what is not done yet; 0 where every item is done, 2 where one failed."""
    if not arguments.ray:
        with parallel.job(arguments) as job:
            return _run_on_ranks(arguments, job)
    items, manifest, todo = _open(arguments)
    _run_with_ray(arguments, todo, manifest)
    return _report(items, todo, manifest)


def _open(arguments: argparse.Namespace) -> tuple[list[Item], Manifest, list[Item]]:
    """The items, what is known of them, and those that need to run."""
    from ltxkern.commands.batching.items import Manifest, pending, read_items
    from ltxkern.pipeline.results.atomic import output_target

    if arguments.format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {arguments.format!r}")
    if arguments.workers is not None and (arguments.workers < 1 or not arguments.ray):
        raise ValueError(f"workers must be at least 1 and needs --ray, got {arguments.workers}")
    work_dir.check_options(arguments, arguments.cfg_parallel_size or 1)
    items = read_items(arguments.prompts)
    folder = output_target(arguments.output)
    if folder.is_file():
        raise ValueError(f"output {arguments.output!r} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(arguments.output)
    return items, manifest, list(pending(items, manifest, settings(arguments)))


def _run_on_ranks(arguments: argparse.Namespace, job: parallel.Job) -> int:
    items, manifest, todo = _open(arguments)
    if job.ranks is not None:
        # The lead writes the manifest: nobody may read it later than all have read it.
        job.ranks.compare({"items to do": [item.name for item in todo]})
    if todo:
        with Generator(arguments, job) as generator:
            # What cannot be served is said before the first weight is read.
            for item in sorted(todo, key=generator.accepts):
                outcome = generator.outcome(item)
                if job.leads:
                    _note(arguments, manifest, outcome)
        if job.leads and not arguments.quiet:
            parallel.report_traffic(generator.shared)
    job.finish()
    return _report(items, todo, manifest) if job.leads else 0


def _report(items: list[Item], todo: list[Item], manifest: Manifest) -> int:
    failed = [manifest.outcomes[item.name] for item in items if manifest.outcomes[item.name].status != "done"]
    before = len(items) - len(todo)
    print(f"{len(items) - len(failed)} of {len(items)} done ({before} before), in {manifest.folder}")
    for outcome in failed:
        print(f"{outcome.name} failed: {outcome.error}", file=sys.stderr)
    return 2 if failed else 0


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that every item's result depends on."""
    return {name: value for name, value in vars(arguments).items() if name not in _OUTPUT_ONLY}


def item_arguments(arguments: argparse.Namespace, given: Mapping[str, Any]) -> argparse.Namespace:
    """The command's options with those of one line on top; null, as exported tables have it, is not given.

    Raises:
        ValueError: an unknown option, or a value that does not fit.
    """
    given = {name: _without_nulls(value) for name, value in given.items() if value is not None}
    parser = _ItemParser(add_help=False, allow_abbrev=False)
    options.add_request_options(parser)
    home_in_paths(parser)
    known = {action.dest for action in parser._actions}
    # Pictures of a line take the place of the command's; the action would append them.
    parser.set_defaults(
        **{name: value for name, value in vars(arguments).items() if name != "image" or name not in given}
    )
    line = []
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r}: use {', '.join(sorted(known))}")
        if isinstance(value, list) and name != "image":
            raise ValueError(f"{name} must be one value, got {value!r}")
        for one in value if isinstance(value, list) else [value]:
            line.append(f"{options.spelled(name)}={one}")
    return parser.parse_args(line)


def _without_nulls(value: Any) -> Any:
    return [one for one in value if one is not None] if isinstance(value, list) else value


class _ItemParser(argparse.ArgumentParser):
    """A parser of a line in a file: it raises where one of the command line would leave the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Generator:
    """Generates items on one rank, with one pipeline for all of them."""

    def __init__(self, arguments: argparse.Namespace, job: parallel.Job) -> None:
        self._arguments, self._job = arguments, job
        self.shared: CFGParallel | None = None
        self._chosen = admission.read_model_options(arguments)
        self._stack = contextlib.ExitStack()
        self._pipeline = self._stack.enter_context(self._chosen.open())

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def accepts(self, item: Item) -> bool:
        """Whether an item's options and pictures can be served; `outcome` says why not."""
        try:
            self._request(item)
        except options.expected_errors():
            return False
        return True

    def _request(self, item: Item) -> GenerationRequest:
        request = admission.read_request(item_arguments(self._arguments, item.options), self._chosen)
        if not request.prompts()[0].strip():
            raise ValueError("prompt is missing")
        return request

    def outcome(self, item: Item) -> Outcome:
        """What became of an item; an error that concerns it alone is its outcome."""
        from ltxkern.commands.batching.items import attempt, digest

        wanted = digest(item, settings(self._arguments))
        return attempt(item, wanted, self._generate, _collected(self._job.ranks is not None))

    def _generate(self, item: Item) -> Path:
        """Generate an item and write it beside the others; only the lead writes."""
        from ltxkern.pipeline.results.atomic import writable_output

        request = self._request(item)
        if self._job.ranks is not None and self._pipeline.denoiser_factory is None:
            # All ranks of the job take part in every item; those beyond its branches idle.
            self.shared = self._job.share(self._pipeline, request, self._job.size, self._arguments.stage2_parallel)
        kind = self._arguments.format
        output = os.path.join(self._arguments.output, f"{item.name}{FORMATS[kind]}")
        if self._job.ranks is None:  # others may not see the folder
            writable_output(output)
        with work_dir.kept(self._alone(item, output), self._job) as work:
            how = "latents" if kind == "latents" else "stream"
            result = self._pipeline.generate(request, output_type=how, work_dir=work)
            if self._job.leads:
                result.save(output)
        return Path(output)

    def _alone(self, item: Item, output: str) -> argparse.Namespace:
        """The options of `ltxkern generate` that make this item alone: what its work folder is found by, and resumed with."""
        alone = item_arguments(self._arguments, item.options)
        for name in _OF_BATCHES:
            delattr(alone, name)
        if alone.work_dir is not None:
            alone.work_dir = os.path.join(alone.work_dir, item.name)
        alone.output, alone.on_nan = output, generate.ON_NAN[0]
        return alone


@dataclass(frozen=True)
class MakeWorker:
    """Makes the worker of one rank inside a Ray actor."""

    arguments: Mapping[str, Any]

    def __call__(self, placement: Placement) -> Callable[[Item], Outcome]:
        """Load the model, meet the other ranks of the group, and return what runs an item."""
        return Generator(argparse.Namespace(**self.arguments), _meet(placement)).outcome


def _meet(placement: Placement) -> parallel.Job:
    if placement.size == 1:
        return parallel.Job(None)
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from ltxkern.pipeline.parallel.ranks import Ranks

    lead = placement.rank == 0
    store = dist.TCPStore(placement.host, placement.port, placement.size, lead, timeout=timedelta(seconds=120))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    ranks = Ranks.join(store, placement.rank, placement.size, backend=backend)
    return parallel.Job(ranks.__enter__(), placement.size)


def _collected(several_ranks: bool) -> tuple[type[BaseException], ...]:
    """Errors that concern one item. On several ranks only those that all of them raise: after another one they are out of step."""
    from ltxkern.pipeline.parallel.ranks import BranchError

    return (BranchError, ValueError) if several_ranks else (BranchError, RuntimeError, *options.expected_errors())


def _run_with_ray(arguments: argparse.Namespace, todo: list[Item], manifest: Manifest) -> None:
    from ltxkern.commands.batching.items import Outcome, digest
    from ltxkern.pipeline.parallel.ranks import Started

    started = Started.from_environment()
    if started.size > 1:
        raise ValueError(f"ray starts its own workers, and torchrun started {started.size} ranks: use one of them")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError('ray is not installed: pip install "ltxkern[ray]", or leave --ray out') from error
    from ltxkern.commands.batching.ray import require_capacity, run_with_ray

    size = arguments.cfg_parallel_size or 1
    parallel.check_options(arguments, Started(size=size))
    if not todo:
        return
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=arguments.verbose)
    gpus = 0.0 if arguments.device == "cpu" else float(ray.cluster_resources().get("GPU", 0.0) > 0)
    groups = arguments.workers or max(1, int(ray.cluster_resources().get("GPU", 1.0)) // size)
    require_capacity(min(groups, len(todo)), size, gpus)
    # A relative path means another folder on each worker.
    plain = {name: value for name, value in vars(arguments).items() if name not in ("run", "parser")}
    plain["output"] = str(manifest.folder.absolute())

    def lost(item: Item, reason: str) -> Outcome:
        return Outcome(item.name, "failed", digest(item, settings(arguments)), error=reason)

    run_with_ray(
        todo,
        MakeWorker(plain),
        lambda outcome: _note(arguments, manifest, outcome),
        lost,
        groups=groups,
        size=size,
        gpus=gpus,
    )


def _note(arguments: argparse.Namespace, manifest: Manifest, outcome: Outcome) -> None:
    manifest.add(outcome)
    if not arguments.quiet:
        print(
            f"{outcome.name}: {outcome.status} after {outcome.seconds:.1f} s {outcome.error}".rstrip(), file=sys.stderr
        )
