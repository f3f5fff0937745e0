"""How strongly a LoRA file says it is to be merged: alpha and rank from its tensors, its header, a file beside it."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ltxkern.pipeline.files.headers import CheckpointError, Header, decoded, warn_once
from ltxkern.pipeline.files.hub import configurations, may_be_of_another, of_other_trainings
from ltxkern.pipeline.files.lora_layout import STARTS, is_foreign

logger = logging.getLogger(__name__)

# These mean a LoRA wherever they stand; the plain names only at the top, or below something that is named after LoRAs.
_ALPHAS = ("lora_alpha", "network_alpha", "linear_alpha", "adapter_alpha")
_RANKS = ("lora_rank", "lora_r", "lora_dim", "network_dim", "network_rank", "adapter_rank")
_PLAIN_RANKS = ("r", "rank", "dim", "linear")
_PATTERNS = ("rank_pattern", "alpha_pattern")
# kohya's trainers and ai-toolkit store an alpha tensor wherever their alpha counts. In a file of lora_A and lora_B
# without one it does not: conversion multiplied it into the factors, or training took the rank for it. The second name
# stands beside the first wherever it is they who wrote it.
_FOLDED = {"network_alpha": "network_module", "linear_alpha": "type"}
_STABILISED = ("use_rslora", "rslora", "rs_lora", "use_rs_lora", "rank_stabilized", "rank_stabilised")
_DECOMPOSED = ("use_dora", "dora_wd", "weight_decompose", "lora_decompose")
_ABOUT_LORA = re.compile(r"lora|peft|adapter|network", re.IGNORECASE)
_OTHERS = re.compile(r"text_encoder|text_model|connector|optim|sched|loss|(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OFF = ("", "0", "false", "no", "none", "null", "off", "[]", "{}")
# Starts of the factors: those that need base weights of their own, and those that leave the base weights alone.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
_KEEPS_BASE = (*_OFF, "true", "1", "gaussian", "eva", "orthogonal", "kaiming", "xavier", "lycoris")
# What a change is that no factor tells of, by the setting that switches it on.
_NOT_MERGED = {
    "alora_invocation_tokens": "the LoRA holds from a token on, not for the whole prompt",
    "arrow_config": "several LoRAs are chosen between at run time",
    "layer_replication": "its blocks are copies of the transformer's",
    "modules_to_save": "whole modules were trained beside the factors",
    "target_parameters": "parameters were changed that are no module's weight",
    "trainable_token_indices": "rows of an embedding were trained beside the factors",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its factors act on groups of the inputs",
}
_USES = ("use_rslora", "use_dora", "use_effective_conv2d", *_NOT_MERGED)
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")

# Nobody's settings are longer.
_LONGEST = 1 << 20


@dataclass
class Statement:
    """What one place says about all modules.

    Args:
        where: the place, for messages.
        rank, alpha: None where it does not say.
        rank_pattern, alpha_pattern: values of modules whose names end like the key, a regular expression.
        stabilised: the product is scaled by alpha / sqrt(rank); None where it does not say.
        decomposed, biased: each module has a magnitude, or a bias of its own.
        refusal: why what it says cannot be merged; "" where it can.
        is_sure: it speaks of a LoRA beyond doubt.
    """

    where: str
    rank: float | None = None
    alpha: float | None = None
    rank_pattern: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    stabilised: bool | None = None
    decomposed: bool = False
    biased: bool = False
    refusal: str = ""
    is_sure: bool = True

    def of(self, names: Iterable[str]) -> tuple[float | None, float | None]:
        """(rank, alpha) of a module that goes by these names."""
        names = tuple(names)
        return _matched(self.rank_pattern, names, self.rank), _matched(self.alpha_pattern, names, self.alpha)

    @property
    def ranks(self) -> set[float]:
        """All ranks that it names."""
        return {*self.rank_pattern.values(), *(() if self.rank is None else (self.rank,))}


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


def statements(header: Header, ranks: Collection[int] = ()) -> list[Statement]:
    """What the header and the configurations beside the file say, in the order of their rank.

    A configuration under a name that any model may have counts where it states the rank of a LoRA, and all files there
    are of one training.

    Args:
        header: of the file.
        ranks: those of its factors.

    Raises:
        CheckpointError: a configuration of the file's own cannot be read, or a change is described that is not merged.
    """
    keys = [key for key in header.tensors if not is_foreign(key)]
    has_alphas = any(key.endswith("alpha") for key in keys)
    reader = _Reader(_FOLDED if any(".lora_A" in key for key in keys) and not has_alphas else {}, has_alphas)
    try:
        # A file's entries lie in no order of anybody's.
        found = list(reader.said(dict(sorted(header.metadata.items())), "its header", plain=True))
    except RecursionError as error:
        raise CheckpointError("its header is nested too deeply") from error
    others = of_other_trainings(header.path, header.path.parent.glob("*.safetensors"))
    for beside in configurations(header.path):
        if not beside.is_file():
            continue
        name, is_shared = beside.name, may_be_of_another(beside, header.path, others)
        try:
            plain = not is_shared or "lora" in name
            told = list(reader.said(_read_configuration(beside), f"{name} beside it", plain=plain))
        except (OSError, ValueError, RecursionError) as error:
            what = (
                f"{name} beside it is no readable configuration ({str(error).splitlines()[0] if str(error) else error})"
            )
            if not is_shared:
                raise CheckpointError(what) from error
            warn_once(logger, f"{header.path}: {what}: it is not taken into account")
            continue
        found += _meant(told, header.path, ranks, others) if is_shared else told
    if refusal := next((statement.refusal for statement in found if statement.refusal), ""):
        raise CheckpointError(refusal)
    return found


def _meant(
    told: Iterable[Statement], path: Path, ranks: Collection[int], others: Sequence[PurePath]
) -> list[Statement]:
    """Of what a configuration says that any model may have beside it, what is about this file."""
    about = [statement for statement in told if statement.ranks & set(ranks) or (statement.ranks and statement.is_sure)]
    if about and others:
        suffix = PurePath(about[0].where.partition(" beside")[0]).suffix
        warn_once(
            logger,
            f"{path}: {about[0].where} is not taken into account, for {others[0].name} lies there too; if it is meant, name it "
            f"{path.stem}{suffix}",
        )
        return []
    for statement in told:
        if statement.is_sure and statement.alpha is not None and not statement.ranks:
            warn_once(logger, f"{path}: {statement.where} has an alpha and no rank: it is not taken into account")
    return about


def _read_configuration(path: Path) -> Any:
    """The content of a JSON, YAML or TOML file."""
    if path.stat().st_size > _LONGEST:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".toml":
        try:
            import tomllib
        except ModuleNotFoundError as error:
            raise ValueError("TOML is read from Python 3.11 on: rewrite it as JSON") from error
        return tomllib.loads(text)
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


@functools.cache
def _yaml_loader() -> Any:
    """A safe loader to which an object of Python's, as trainers write tuples and enumerations, is what it consists of."""
    import yaml

    def plain(loader: Any, _: str, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        is_list = isinstance(node, yaml.SequenceNode)
        return loader.construct_sequence(node, deep=True) if is_list else loader.construct_scalar(node)

    loader: Any = type("PlainLoader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    loader.add_multi_constructor("tag:yaml.org,2002:python/", plain)
    return loader


def _decoded(value: Any) -> Any:
    return decoded(value) if isinstance(value, str) else value


def _number(value: Any) -> float | None:
    value = _decoded(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    # Trainers write alpha 0 where none was asked for, and words where it differs between modules.
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0 else float(value)


def _shown(value: Any) -> str:
    """A value for a message: YAML may hold in a few lines what is endless when it is written out."""
    return value if isinstance(value, str) else reprlib.repr(value)


def _is_on(value: Any) -> bool:
    return bool(value) if isinstance(value, (dict, list)) else str(value).strip().lower() not in _OFF


class _Reader:
    """Finds statements in what trainers wrote.

    Args:
        folded: names of alphas that do not count where the name beside them is in the same mapping.
        has_alphas: tensors tell what a word for an alpha leaves open.
    """

    def __init__(self, folded: Mapping[str, str], has_alphas: bool) -> None:
        self.folded, self.has_alphas = folded, has_alphas
        # YAML may hold one mapping in many places, and within itself.
        self.seen: dict[int, Any] = {}

    def said(self, content: Any, where: str, path: str = "", *, plain: bool) -> Iterator[Statement]:
        """The statements in a mapping of any nesting; entries like "transformer.lora_alpha" are grouped by their start.

        plain: whether names like "rank" mean a LoRA at the top.
        """
        content = _decoded(content)
        if not isinstance(content, (dict, list)) or id(content) in self.seen:
            return
        self.seen[id(content)] = content
        if isinstance(content, list):
            for item in content:
                yield from self.said(item, where, path, plain=plain)
            # "name=value", as kohya's trainers take them.
            pairs = [item.partition("=") for item in content if isinstance(item, str) and "=" in item]
            content = {name.strip(): value.strip() for name, _, value in pairs}
        groups: dict[str, dict[str, Any]] = {}
        for key, value in content.items():
            start, pattern, rest = _pattern_entry(str(key))
            prefix, _, name = str(key).rpartition(".") if not pattern else (start, "", pattern)
            group = groups.setdefault(prefix, {})
            if pattern and rest:
                group.setdefault(pattern, {})[rest] = value
            else:
                group[_CAPITAL.sub("_", name.removeprefix("ss_").strip("-")).replace("-", "_").lower()] = value
        for prefix, group in groups.items():
            inner = f"{path}.{prefix}".strip(".")
            if _OTHERS.search(inner):
                continue
            yield from self.statement(group, where, inner, plain)
            for name, value in group.items():
                if name not in _PATTERNS and not _OTHERS.search(name):
                    yield from self.said(value, where, f"{inner}.{name}".strip("."), plain=plain)

    def statement(self, group: Mapping[str, Any], where: str, path: str, plain: bool) -> Iterator[Statement]:
        """What one mapping says; nothing where it does not speak of a LoRA."""
        is_sure = any(name in group for name in (*_ALPHAS, *_RANKS, *_PATTERNS, "peft_type"))
        names_both = "alpha" in group and ("rank" in group or "r" in group)
        plain = is_sure or (plain and (not path or names_both)) or _ABOUT_LORA.search(path) is not None
        place = where if not path else f"{where} ({path})"
        statement = Statement(place, is_sure=is_sure or re.search("lora|peft|adapter", path) is not None)
        refusals = [_unmerged(group, place)]
        for names, attribute in (
            ((*_ALPHAS, *(("alpha",) if plain else ())), "alpha"),
            ((*_RANKS, *(_PLAIN_RANKS if plain else ())), "rank"),
        ):
            values = {name: value for name in names if (value := _number(group.get(name))) is not None}
            refusals += [f"{place} says {name} {value}" for name, value in values.items() if not math.isfinite(value)]
            if len(set(values.values())) > 1:
                told = " and ".join(f"{name} {value:g}" for name, value in values.items())
                refusals.append(f"{place} contradicts itself about the {attribute}: {told}")
            counting = [name for name in names if self.folded.get(name) not in group]
            setattr(statement, attribute, next((values[name] for name in counting if name in values), None))
            # One number per module may stand under the name itself.
            for name in (f"{attribute}_pattern", *counting):
                listed = _decoded(group.get(name))
                numbers = {key: _number(value) for key, value in listed.items()} if isinstance(listed, dict) else {}
                pattern = getattr(statement, f"{attribute}_pattern")
                pattern |= {key: number for key, number in numbers.items() if number is not None}
                is_word = isinstance(listed, (str, list)) and name in _ALPHAS and name not in values and _is_on(listed)
                if is_word and not self.has_alphas and _number(listed) is None and _decoded(listed) != 0:
                    refusals.append(f"{place} says {name} {listed!r}: expected a number")
        said = [_is_on(group[name]) for name in _STABILISED if group.get(name) is not None]
        statement.stabilised = any(said) if said else None
        statement.decomposed, statement.biased = (
            any(_is_on(group.get(name)) for name in names) for names in (_DECOMPOSED, ("lora_bias",))
        )
        statement.refusal = next((refusal for refusal in refusals if refusal), "")
        if statement != Statement(place, is_sure=statement.is_sure):
            yield statement


def _pattern_entry(key: str) -> tuple[str, str, str]:
    """(start, "rank_pattern" or "alpha_pattern", module) of a flat entry of a pattern; empty where it is none."""
    for pattern in _PATTERNS:
        before, found, after = f".{key}".partition(f".{pattern}")
        if found and (not after or after.startswith(".")):
            return before.strip("."), pattern, after.strip(".")
    return "", "", ""


def _unmerged(group: Mapping[str, Any], place: str) -> str:
    """Why the change that a mapping describes is more than its factors; "" where it is not."""
    for name in ("init_lora_weights", "init_weights"):
        start = _shown(group.get(name, "")).lower()
        if start.startswith(_REWRITES_BASE) or (name == "init_lora_weights" and start not in _KEEPS_BASE):
            return (
                f"{place} says {name} {_shown(group[name])}: its factors belong to base weights that its training changed; "
                "convert it to a plain LoRA first"
            )
    for name, why in _NOT_MERGED.items():
        if _is_on(group.get(name)):
            return f"{place} says {name} {_shown(group[name])}: {why}, which is not merged here"
    if "peft_type" not in group:
        return ""
    kind = _shown(group["peft_type"]).rpartition(".")[2].upper()
    if kind not in _PEFT_TYPES:
        return f"{place} says peft_type {_shown(group['peft_type'])}: expected one of {', '.join(_PEFT_TYPES)}"
    if _is_on(group.get("bias")):
        return f"{place} says bias {_shown(group['bias'])}: biases of the transformer were trained too, which is not merged here"
    for name, value in group.items():
        if name.startswith("use_") and name not in _USES and _is_on(value):
            return f"{place} says {name} {_shown(value)}, of which it is not known here what it does to the product"
    return ""


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
        CheckpointError: two places disagree, or the tensor says 0.
    """
    said, names = list(said), tuple(names)
    if tensor == 0:
        raise CheckpointError(
            f"the alpha of {names[0]} is 0, which some tools read as no change and some as alpha = rank: store the rank, "
            "or leave the alpha out"
        )
    roots = {statement.stabilised: statement.where for statement in said if statement.stabilised is not None}
    if rank is not None and len(roots) > 1:
        raise CheckpointError(
            f"{names[0]} is scaled by alpha / sqrt(rank) by {roots[True]}, and by alpha / rank by {roots[False]}"
        )
    stabilised = rank is not None and True in roots
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
