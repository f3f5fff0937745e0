"""What `ltxkern verify` has proven of each op and tier, kept by machine: card, driver, torch, Triton and build.

`verify` writes, dispatch reads, once a process and kind of device. A file that is damaged, of another origin than its name says, or
that cannot be read is named in a warning and taken as absent: what it says is never trusted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ltxkern import sources
from ltxkern.compiled import extension
from ltxkern.trust import machine
from ltxkern.whole_files import cache_folder, replacing

logger = logging.getLogger("ltxkern")

SCHEMA = 1
# Of the checks of a run: some, all of a quick one, all of a full one.
LEVELS = ("partial", "quick", "full")
TIERS = ("cuda", "nvrtc", "triton", "cpu")


class Origin(NamedTuple):
    """What a proof holds for: with any other value of one of these it says nothing."""

    card: str
    capability: str
    driver: str
    torch: str
    triton: str
    build: str

    @property
    def path(self) -> Path:
        """Its file."""
        name = hashlib.sha256("\0".join(self).encode()).hexdigest()[:32]
        return cache_folder() / "proofs" / f"{name}.json"


@dataclass(frozen=True)
class Verdict:
    """Of one op on one tier.

    Attributes:
        passed: all checks did, or which one did not is the `reason`.
        level: "quick" or "full" by the run that found it; "partial" where that passed, but did not come to all of its checks.
        checks: how many ran.
    """

    passed: bool
    level: str
    checks: int
    reason: str = ""


@dataclass(frozen=True)
class Proof:
    """Of one origin: a verdict by op and tier, and by op the tiers that were timed, quickest first."""

    verdicts: Mapping[str, Mapping[str, Verdict]] = field(default_factory=dict)
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    when: str = ""

    def updated(self, newer: Proof) -> Proof:
        """Both; a wrong result outlives a run that did not come to all the checks of the one that met it."""
        merged = {op: dict(row) for op, row in self.verdicts.items()}
        for op, row in newer.verdicts.items():
            for tier, verdict in row.items():
                old = merged.setdefault(op, {}).get(tier)
                weaker = old is not None and LEVELS.index(old.level) > LEVELS.index(verdict.level)
                if old is None or not weaker or (old.passed and not verdict.passed):
                    merged[op][tier] = verdict
        return Proof(merged, {**self.order, **newer.order}, newer.when)


def origins(kind: str) -> dict[str, Origin]:
    """Of the visible devices of a kind, by the name of one of them: equal cards have one origin. Only "cpu" and "cuda" have any."""
    if kind not in ("cpu", "cuda"):
        return {}
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    software = (torch.__version__, triton, sources.build())
    if kind == "cpu":
        isa = "none" if extension.unavailable("cpu") else extension.module().isa()
        return {"cpu": Origin(machine.processor(), isa, "none", *software)}
    found: dict[Origin, str] = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        origin = Origin(card.name, f"{card.major}.{card.minor}", machine.nvidia_driver(), *software)
        found.setdefault(origin, f"cuda:{index}")
    return {name: origin for origin, name in found.items()}


def read(origin: Origin) -> Proof | None:
    """The stored proof of an origin; None where there is none, or, with a warning, none that can be trusted."""
    path = origin.path
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("the proof %s cannot be read and is ignored: %s", path, error)
        return None
    try:
        return _parsed(json.loads(text), origin)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("the proof %s is ignored: %s; `ltxkern verify` writes it anew", path, error)
        return None


def _parsed(data: Any, origin: Origin) -> Proof:
    """The proof in a file's data; ValueError, TypeError, KeyError or AttributeError for anything else."""
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema {data['schema']}, not {SCHEMA}")
    if data["origin"] != origin._asdict():
        raise ValueError("it was written for another card, driver, torch or build")
    verdicts = {op: {tier: Verdict(**entry) for tier, entry in row.items()} for op, row in data["verdicts"].items()}
    for op, row in verdicts.items():
        for tier, verdict in row.items():
            well_formed = type(verdict.passed) is bool and type(verdict.checks) is int and type(verdict.reason) is str
            if tier not in TIERS or verdict.level not in LEVELS or not well_formed:
                raise ValueError(f"{op} on {tier} has no verdict but {verdict}")
    order = {op: tuple(tiers) for op, tiers in data["order"].items()}
    if any(tier not in TIERS for tiers in order.values() for tier in tiers):
        raise ValueError("it orders tiers that do not exist")
    return Proof(verdicts, order, str(data["when"]))


def write(origin: Origin, proof: Proof) -> str | None:
    """Store a proof, whole or not at all, on top of what is stored; the reason in words where that is not possible."""
    path, stored = origin.path, read(origin)
    whole = stored.updated(proof) if stored is not None else proof
    text = json.dumps({"schema": SCHEMA, "origin": origin._asdict(), **asdict(whole)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text + "\n")
    except OSError as error:
        return (
            f"the proof cannot be stored in {path.parent} ({error.strerror or error}): "
            "set LTXKERN_CACHE to a folder that can be written"
        )
    return None


@functools.cache
def stored(kind: str) -> dict[str, Proof | None]:
    """The proofs of the visible devices of a kind, by the name of one of them; None where a card has none."""
    return {name: read(origin) for name, origin in origins(kind).items()}


def verdicts(kind: str, op: str, tier: str) -> dict[str, Verdict | None]:
    """What is stored of an op on a tier, by device; None where a card has no proof of it."""
    return {
        name: None if proof is None else proof.verdicts.get(op, {}).get(tier) for name, proof in stored(kind).items()
    }


def order(kind: str, op: str) -> tuple[str, ...]:
    """The tiers of an op, quickest first, on the first device that they were timed on; nothing where on none."""
    return next((proof.order[op] for proof in stored(kind).values() if proof is not None and op in proof.order), ())
