"""How strongly a LoRA file says it is to be merged: alpha and rank from its tensors, its header, a file beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ltxkern.pipeline.files.headers import CheckpointError, Header
from ltxkern.pipeline.files.lora_layout import STARTS

# These mean a LoRA wherever they stand; the plain names only at the top, or below something that is named after LoRAs.
_ALPHAS = ("lora_alpha", "network_alpha", "linear_alpha", "adapter_alpha")
_RANKS = ("lora_rank", "lora_r", "lora_dim", "network_dim", "network_rank", "adapter_rank")
_PLAIN_RANKS = ("r", "rank", "dim", "linear")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_STABILISED = ("use_rslora", "rslora", "use_rs_lora", "rank_stabilized", "rank_stabilised")
_ABOUT_LORA = re.compile(r"lora|peft|adapter|network", re.IGNORECASE)
_OTHERS = re.compile(r"text_encoder|text_model|connector|optim|sched|loss|(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
# Adapters of these starts need base weights of their own.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass
class Statement:
    """What one place says about all modules.

    Args:
        where: the place, for messages.
        rank, alpha: None where it does not say.
        rank_pattern, alpha_pattern: values of modules whose names end like the key, a regular expression.
        stabilised: the product is scaled by alpha / sqrt(rank).
    """

    where: str
    rank: float | None = None
    alpha: float | None = None
    rank_pattern: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    stabilised: bool = False

    def of(self, names: Iterable[str]) -> tuple[float | None, float | None]:
        """(rank, alpha) of a module that goes by these names."""
        names = tuple(names)
        return _matched(self.rank_pattern, names, self.rank), _matched(self.alpha_pattern, names, self.alpha)


def _matched(pattern: Mapping[str, float], names: tuple[str, ...], default: float | None) -> float | None:
    for key, value in pattern.items():
        while (start := key.partition("."))[0] in STARTS and start[2]:
            key = start[2]
        for name in names:
            try:
                if key == name or re.fullmatch(rf"(?:.*\.)?(?:{key})", name):
                    return value
            except re.error:
                continue
    return default


def statements(header: Header) -> list[Statement]:
    """What the header and a configuration beside the file say, in the order of their rank.

    Raises:
        CheckpointError: the adapter belongs to base weights that its training changed.
    """
    # A file's entries lie in no order of anybody's.
    found = list(_said(dict(sorted(header.metadata.items())), "its header"))
    for name in (f"{header.path.stem}.json", "adapter_config.json"):
        beside = header.path.with_name(name)
        if beside.is_file():
            try:
                content = json.loads(beside.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{name} beside it is no readable configuration ({error})") from error
            found += _said(content, f"{name} beside it")
    return found


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _number(value: Any) -> float | None:
    value = _decoded(value)
    # Trainers write alpha 0 where none was asked for, and words where it differs between modules.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        return None
    return float(value)


def _said(content: Any, where: str, path: str = "") -> Iterator[Statement]:
    """The statements in a mapping of any nesting; entries like "transformer.lora_alpha" are grouped by their start."""
    content = _decoded(content)
    if isinstance(content, list):
        for item in content:
            yield from _said(item, where, path)
    if not isinstance(content, dict):
        return
    groups: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        start, pattern, rest = _pattern_entry(str(key))
        prefix, _, name = str(key).rpartition(".") if not pattern else (start, "", pattern)
        group = groups.setdefault(prefix, {})
        if pattern and rest:
            group.setdefault(pattern, {})[rest] = value
        else:
            group[name.removeprefix("ss_").lower()] = value
    for prefix, group in groups.items():
        inner = f"{path}.{prefix}".strip(".")
        if _OTHERS.search(inner):
            continue
        yield from _statement(group, where, inner)
        for name, value in group.items():
            if name not in _PATTERNS and not _OTHERS.search(name):
                yield from _said(value, where, f"{inner}.{name}".strip("."))


def _pattern_entry(key: str) -> tuple[str, str, str]:
    """(start, "rank_pattern" or "alpha_pattern", module) of a flat entry of a pattern; empty where it is none."""
    for pattern in _PATTERNS:
        before, found, after = f".{key}".partition(f".{pattern}")
        if found and (not after or after.startswith(".")):
            return before.strip("."), pattern, after.strip(".")
    return "", "", ""


def _statement(group: Mapping[str, Any], where: str, path: str) -> Iterator[Statement]:
    for name in ("init_lora_weights", "init_weights"):
        if str(group.get(name, "")).lower().startswith(_REWRITES_BASE):
            raise CheckpointError(
                f"{where} says {name} {group[name]}: its factors belong to base weights that its training changed; "
                "convert it to a plain LoRA first"
            )
    plain = (
        not path
        or _ABOUT_LORA.search(path) is not None
        or any(name in group for name in (*_ALPHAS, *_RANKS, *_PATTERNS))
    )
    alphas = [(name, _number(group.get(name))) for name in (*_ALPHAS, *(("alpha",) if plain else ()))]
    ranks = [(name, _number(group.get(name))) for name in (*_RANKS, *(_PLAIN_RANKS if plain else ()))]
    patterns = [
        {key: number for key, value in listed.items() if (number := _number(value)) is not None}
        if isinstance(listed := _decoded(group.get(name)), dict)
        else {}
        for name in _PATTERNS
    ]
    stabilised = any(_decoded(str(group.get(name, "")).lower()) is True for name in _STABILISED)
    place = where if not path else f"{where} ({path})"
    for values, attribute in ((alphas, "alpha"), (ranks, "rank")):
        if len({value for _, value in values if value is not None}) > 1:
            told = " and ".join(f"{name} {value:g}" for name, value in values if value is not None)
            raise CheckpointError(f"{place} contradicts itself about the {attribute}: {told}")
    alpha = next((value for _, value in alphas if value is not None), None)
    rank = next((value for _, value in ranks if value is not None), None)
    if alpha is not None or rank is not None or stabilised or any(patterns):
        yield Statement(place, rank, alpha, patterns[0], patterns[1], stabilised)


def effective_alpha(
    rank: int | None, tensor: float | None, said: Iterable[Statement], names: Iterable[str]
) -> float | None:
    """The alpha for which alpha / rank is what the file wants its product scaled by; None where nothing tells one.

    Args:
        rank: of the factors; None where the kind of change has none.
        tensor: what an `.alpha` tensor says.
        said: `statements`.
        names: what the module is called, for the patterns.

    Raises:
        CheckpointError: two places disagree.
    """
    said, names = list(said), tuple(names)
    stabilised = rank is not None and any(statement.stabilised for statement in said)
    alpha, place = tensor, "its alpha tensor"
    for statement in said:
        told_rank, told = statement.of(names)
        if rank is not None and told_rank is not None and told_rank != rank:
            raise CheckpointError(
                f"{names[0]} has rank {rank} by the shapes of its factors, and rank {told_rank:g} by {statement.where}"
            )
        if told is None:
            continue
        if alpha is None:
            alpha, place = told, statement.where
        elif stabilised and math.isclose(alpha, told * math.sqrt(rank or 1), rel_tol=2**-7):
            return alpha  # a trainer that stores the root with it
        elif not math.isclose(alpha, told, rel_tol=2**-7):
            raise CheckpointError(f"{names[0]} has alpha {alpha:g} by {place}, and alpha {told:g} by {statement.where}")
    return alpha if alpha is None or rank is None or not stabilised else alpha * rank / math.sqrt(rank)
