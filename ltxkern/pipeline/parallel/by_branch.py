"""CFG parallel: the guidance branches of an evaluation run side by side on several ranks, with the result of one process.

Every rank holds the whole sampler state and runs its branches; one collective an evaluation brings all predictions to all ranks,
and every rank combines them in branch order. Bits are moved, never added, so that the result equals one process's exactly.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.parallel.by_token import SequenceParallel
from ltxkern.pipeline.parallel.collectives import Collectives, checksum
from ltxkern.pipeline.parallel.ranks import BranchError, RankError
from ltxkern.pipeline.sampling.guidance import CFGBranch, CFGPolicy, Forward, GuidedDenoiser, Prediction
from ltxkern.pipeline.sampling.state import Latents

# Multiply-adds that a stage-1 forward of the 48-block model saves (docs/parallel.md): they only order the branches.
_SAVED = {"disable_a2v_cross_attn": 0.05, "disable_v2a_cross_attn": 0.05}
_SAVED_PER_BLOCK = 0.006

_HEADER = 512  # bytes in front of a rank's predictions: five int64, then text
_NUMBERS = 5
_AGREEMENT = 2048
_ALIGNMENT = 256
_OK, _FAILED = 0, 1


def branch_costs(branches: Sequence[CFGBranch]) -> list[float]:
    """Relative cost of each branch's forward; a full one is 1."""
    costs = []
    for branch in branches:
        blocks = sum(len(branch.kwargs.get(f"skip_{name}_self_attn_blocks", ())) for name in ("video", "audio"))
        saved = sum(share for name, share in _SAVED.items() if branch.kwargs.get(name))
        costs.append(1.0 - saved - min(_SAVED_PER_BLOCK * blocks, 0.3))
    return costs


def dispatch_branches(n: int, ranks: int, costs: Sequence[float] | None = None) -> list[tuple[int, ...]]:
    """Which branches each rank runs.

    Equal costs: branch i goes to rank i mod ranks. Else: the dearest branch not yet placed goes to the rank with the least to do;
    branch 0 is on rank 0 either way. Ranks beyond the branches get none.

    Args:
        n: branches of an evaluation, at least 1.
        ranks: at least 1.
        costs: relative cost of each branch's forward; None for equal ones.
    Returns:
        Branch indices in rising order, one tuple per rank; every branch exactly once.
    Raises:
        ValueError: n or ranks below 1, or costs that are not n positive numbers.
    """
    for name, value in (("n", n), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: use 1")
    costs = [1.0] * n if costs is None else list(costs)
    if len(costs) != n or not all(0 < cost < float("inf") for cost in costs):
        raise ValueError(f"costs must be {n} positive numbers, got {costs}")
    load = [0.0] * ranks
    placed: list[list[int]] = [[] for _ in range(ranks)]
    for branch in sorted(range(n), key=lambda index: (-costs[index], index)):
        rank = min(range(ranks), key=lambda index: (load[index], index))
        placed[rank].append(branch)
        load[rank] += costs[branch]
    first = next(rank for rank in range(ranks) if 0 in placed[rank])
    placed[0], placed[first] = placed[first], placed[0]
    return [tuple(sorted(branches)) for branches in placed]


@dataclass(frozen=True)
class _Layout:
    """Name, dtype and shape of each tensor of a prediction, and where it lies in a branch's bytes."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, prediction: Prediction) -> _Layout:
        return cls(tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in prediction.items()))

    @classmethod
    def from_json(cls, items: Sequence[Any]) -> _Layout:
        return cls(tuple((name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in items))

    def to_json(self) -> list[Any]:
        return [[name, str(dtype).removeprefix("torch."), list(shape)] for name, dtype, shape in self.tensors]

    def pieces(self, start: int) -> list[tuple[str, torch.dtype, tuple[int, ...], slice]]:
        """Where each tensor lies in a buffer whose branch begins at byte `start`."""
        found = []
        for name, dtype, shape in self.tensors:
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            found.append((name, dtype, shape, slice(start, stop)))
            start = -(-stop // _ALIGNMENT) * _ALIGNMENT
        return found

    @property
    def bytes(self) -> int:
        """Size of one branch's prediction, aligned."""
        if not self.tensors:
            return 0
        return -(-self.pieces(0)[-1][3].stop // _ALIGNMENT) * _ALIGNMENT


@dataclass
class CFGParallel(Collectives):
    """The ranks that share out guidance branches.

    Attributes:
        group: process group of the data; None for the default one.
        ranks: the job's control plane, which explains broken collectives; None where there is none.
        traffic: collectives and bytes so far.
        costs: relative cost of each branch of a policy; None for an estimate by what a branch leaves out.
        sequence: the same ranks, sharing out the tokens of stages of one branch; None where rank 0 runs these alone.
    """

    costs: Sequence[float] | None = None
    sequence: SequenceParallel | None = None

    def denoiser(self, policy: CFGPolicy, forward: Any) -> GuidedDenoiser:
        """The denoiser_factory of a pipeline run: `run_cfg_parallel` over these ranks, the plain denoiser for a single branch.

        A stage of one branch is run by every rank that takes part in it (see `stages`), or shared out by tokens.
        """
        if len(policy.branches) > 1:
            return run_cfg_parallel(policy, forward, parallel=self)
        return GuidedDenoiser(policy, forward if self.sequence is None else self.sequence.forward(forward))

    def stages(self, policies: Sequence[CFGPolicy]) -> int:
        """How many of a run's stages this rank takes part in.

        Stages of one branch at the end of a run are rank 0's alone, unless their tokens are shared out: the other ranks have
        nothing to give and nobody to give it to.
        """
        if self.rank == 0 or self.sequence is not None:
            return len(policies)
        shared = [index for index, policy in enumerate(policies) if len(policy.branches) > 1]
        return shared[-1] + 1 if shared else 0


def run_cfg_parallel(
    policy: CFGPolicy,
    forward: Forward,
    *,
    parallel: CFGParallel | None = None,
    group: Any = None,
    costs: Sequence[float] | None = None,
) -> GuidedDenoiser:
    """The denoiser of one stage, its branches shared out over the ranks of a process group.

    Each evaluation: every rank runs its branches (`dispatch_branches`), one all-gather brings all predictions, video and audio
    in one buffer, to all ranks, and each rank combines them in branch order. In the first evaluation one small all-gather comes
    before it, in which the ranks agree on branches, contexts and the layout of a prediction; idle ranks learn the layout there.

    Args:
        policy: built alike on every rank.
        forward: `forward(latents, sigma, branch) -> x0 by modality`, the same weights on every rank.
        parallel: ranks and counters; None makes them from `group`.
        group: torch.distributed process group where `parallel` is None; None for the default one.
        costs: relative branch costs where `parallel` is None.
    Returns:
        A denoiser for `res2s_sample` or `euler_sample`; call it on every rank with the same latents. A group of one rank gets
        the plain one.
    Raises:
        RankError: (by the denoiser) on every rank, with the message of the rank whose forward failed; or where the ranks differ
            in latents, sigma, branches or contexts.

    Contract: exact; bit-identical to one process with the same number of threads.
    Bytes: one evaluation sends ceil(branches / ranks) predictions (and 512 bytes) from each rank to each other one.
    """
    parallel = parallel or CFGParallel(group, costs=costs)
    if parallel.size == 1:
        return GuidedDenoiser(policy, forward)
    return GuidedDenoiser(policy, forward, runner=_Exchange(parallel, policy.branches))


class _Exchange:
    """The runner of one stage: own branches, then everybody's predictions."""

    def __init__(self, parallel: CFGParallel, branches: Sequence[CFGBranch]) -> None:
        costs = branch_costs(branches) if parallel.costs is None else parallel.costs
        self._parallel = parallel
        self._placed = dispatch_branches(len(branches), parallel.size, costs)
        self._slots = max(len(indices) for indices in self._placed)
        self._layout: _Layout | None = None
        self._evaluation = 0

    def __call__(
        self, branches: Sequence[CFGBranch], forward: Forward, latents: Latents, sigma: float
    ) -> dict[str, Prediction]:
        self._evaluation += 1
        own, failure = self._run(branches, forward, latents, sigma)
        if self._layout is None:
            self._layout = self._agree(branches, own, failure, next(iter(latents.values())).device)
        if failure is None:
            failure = self._misfit(branches, own)
        buffer = self._pack(own, failure, latents, sigma)
        everyone = self._parallel.gather(buffer)
        self._parallel.traffic.evaluations += 1
        _check_headers(everyone[:, :_HEADER].cpu(), failure)
        return self._unpack(branches, everyone)

    def _run(
        self, branches: Sequence[CFGBranch], forward: Forward, latents: Latents, sigma: float
    ) -> tuple[list[Prediction], _Failure | None]:
        """This rank's predictions, or why there are none: a rank that fails still takes part, so that all of them hear of it."""
        own: list[Prediction] = []
        for index in self._placed[self._parallel.rank]:
            try:
                own.append(dict(forward(latents, sigma, branches[index])))
            except Exception as error:
                text = f"rank {self._parallel.rank} failed in branch {branches[index].name}: {type(error).__name__}: {error}"
                return [], _Failure(text, error)
        return own, None

    def _agree(
        self, branches: Sequence[CFGBranch], own: Sequence[Prediction], failure: _Failure | None, device: torch.device
    ) -> _Layout:
        """The layout of a prediction, from the ranks that have one; every rank checks that all work on the same branches."""
        mine: dict[str, Any] = {"branches": _fingerprints(branches) if failure is None else []}
        mine["failure"] = failure.text[:1000] if failure is not None else None
        mine["layout"] = _Layout.of(own[0]).to_json() if own else None
        text = json.dumps(mine).encode()
        if len(text) > _AGREEMENT:
            raise ValueError(
                f"the policy's branches need {len(text)} bytes to describe, at most {_AGREEMENT}: use fewer"
            )
        buffer = torch.zeros(_AGREEMENT, dtype=torch.uint8)
        buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        blocks = self._parallel.gather(buffer.to(device)).cpu().numpy()
        everyone = [json.loads(block.tobytes().rstrip(b"\0")) for block in blocks]
        for theirs in everyone:
            if theirs["failure"] is not None:
                raise BranchError(theirs["failure"]) from (failure.error if failure is not None else None)
        layouts = [theirs["layout"] for theirs in everyone if theirs["layout"] is not None]
        for rank, theirs in enumerate(everyone):
            if theirs["branches"] != everyone[0]["branches"]:
                raise RankError(f"rank {rank} {_difference(theirs['branches'], everyone[0]['branches'])}")
            if theirs["layout"] not in (None, layouts[0]):
                raise RankError(f"rank {rank} predicts {theirs['layout']}, rank 0 predicts {layouts[0]}")
        return _Layout.from_json(layouts[0])

    def _misfit(self, branches: Sequence[CFGBranch], own: Sequence[Prediction]) -> _Failure | None:
        indices = self._placed[self._parallel.rank]
        for index, prediction in zip(indices, own, strict=True):
            if _Layout.of(prediction) != self._layout:
                rank, name = self._parallel.rank, branches[index].name
                assert self._layout is not None
                text = f"rank {rank}: branch {name} predicted {_Layout.of(prediction).to_json()}, {self._layout.to_json()} before"
                return _Failure(text, None)
        return None

    def _pack(self, own: Sequence[Prediction], failure: _Failure | None, latents: Latents, sigma: float) -> Tensor:
        """Header and predictions of this rank as bytes on the latents' device."""
        assert self._layout is not None
        device = next(iter(latents.values())).device
        buffer = torch.zeros(_HEADER + self._slots * self._layout.bytes, dtype=torch.uint8, device=device)
        text = b"" if failure is None else _clip(failure.text, _HEADER - 8 * _NUMBERS)
        numbers = [_OK if failure is None else _FAILED, self._evaluation, _bits(sigma), len(text), 0]
        head = struct.pack(f"<{_NUMBERS}q", *numbers) + text
        buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(device)
        buffer[8 * (_NUMBERS - 1) : 8 * _NUMBERS].view(torch.int64)[0] = checksum(latents.values())
        for slot, prediction in enumerate(own if failure is None else ()):
            for name, dtype, shape, where in self._layout.pieces(_HEADER + slot * self._layout.bytes):
                buffer[where].view(dtype).view(shape).copy_(prediction[name])
        return buffer

    def _unpack(self, branches: Sequence[CFGBranch], everyone: Tensor) -> dict[str, Prediction]:
        """Predictions of all branches, in branch order, as views of the gathered bytes."""
        assert self._layout is not None
        where = {index: (rank, slot) for rank, indices in enumerate(self._placed) for slot, index in enumerate(indices)}
        predictions: dict[str, Prediction] = {}
        for index, branch in enumerate(branches):
            rank, slot = where[index]
            pieces = self._layout.pieces(_HEADER + slot * self._layout.bytes)
            predictions[branch.name] = {
                name: everyone[rank][part].view(dtype).view(shape) for name, dtype, shape, part in pieces
            }
        return predictions


@dataclass(frozen=True)
class _Failure:
    """Why a rank has no prediction."""

    text: str
    error: Exception | None


def _check_headers(headers: Tensor, failure: _Failure | None) -> None:
    """Raise RankError, the same on every rank, where a rank failed or is at another point of the schedule."""
    first: tuple[int, ...] | None = None
    for rank, header in enumerate(headers):
        block = header.numpy().tobytes()
        status, evaluation, sigma, length, checksum = struct.unpack_from(f"<{_NUMBERS}q", block)
        if status != _OK:
            text = block[8 * _NUMBERS : 8 * _NUMBERS + length].decode(errors="replace")
            raise BranchError(text) from (failure.error if failure is not None else None)
        point = (evaluation, sigma, checksum)
        if first is None:
            first = point
        elif point != first:
            kind = "its latents differ" if point[:2] == first[:2] else _where(point)
            raise RankError(f"rank {rank} is out of step with rank 0: {kind}; rank 0: {_where(first)}")


def _where(point: tuple[int, ...]) -> str:
    sigma = struct.unpack("<d", struct.pack("<q", point[1]))[0]
    return f"evaluation {point[0]} at sigma {sigma:.6g}"


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _fingerprints(branches: Sequence[CFGBranch]) -> list[list[Any]]:
    """Name of each branch and, per argument, eight hex digits that differ where the argument does."""
    found = []
    for branch in branches:
        digests = {}
        for name, value in branch.kwargs.items():
            if isinstance(value, Tensor):
                content = f"{tuple(value.shape)} {value.dtype} {int(checksum([value]))}"
            else:
                content = repr(value)
            digests[name] = hashlib.sha256(content.encode()).hexdigest()[:8]
        found.append([branch.name, digests])
    return found


def _difference(theirs: list[list[Any]], ours: list[list[Any]]) -> str:
    names, expected = [name for name, _ in theirs], [name for name, _ in ours]
    if names != expected:
        return f"has the branches {', '.join(names)}, rank 0 has {', '.join(expected)}"
    for (name, digests), (_, reference) in zip(theirs, ours, strict=True):
        for argument in sorted({*digests, *reference}):
            if digests.get(argument) != reference.get(argument):
                return f"has another {argument} in branch {name} than rank 0: check that both got the same prompt and arguments"
    return "differs from rank 0"


def _clip(text: str, size: int) -> bytes:
    return text.encode()[:size].decode(errors="ignore").encode()
