"""Operands of machine instructions, as their text says them, and their values as numbers, addresses and predicates."""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MASK = 0xFFFFFFFF
WIDE = 0xFFFFFFFFFFFFFFFF
# Unknown, a number of 32 bits, or a predicate.
Value = int | bool | None
_REGISTER = re.compile(r"(U?)(R|P)(\d+|Z|T)$")
_CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[(?:(U?R\d+|URZ|RZ)\+?)?(-?0x[0-9a-f]+)?\]")
_NUMBER = re.compile(r"-?(?:0x[0-9a-f]+|\d+)$")
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|INF|QNAN|SNAN)$", re.IGNORECASE)


@dataclass(frozen=True)
class Operand:
    """One operand of an instruction as its text says it.

    Attributes:
        register: "R5", "UR4", "P0"; None for constants, and for those that are always zero or true.
        memory: whether it is an address, in brackets.
        bank: offset in the constant bank 0, with `register` added; None where it is no constant.
    """

    text: str
    register: str | None = None
    kind: str = ""
    negative: bool = False
    inverted: bool = False
    absolute: bool = False
    immediate: int | None = None
    bank: int | None = None
    memory: bool = False
    second: str | None = None

    def registers(self, count: int) -> list[str]:
        """`count` registers from the first on; of an address all that it is made of."""
        if self.memory:
            names = [] if self.register is None else following(self.register, 2)
            return names if self.second is None else names + following(self.second, 2)
        return [] if self.register is None else following(self.register, count)

    def truth(self, values: Mapping[str, Value]) -> Value:
        """A predicate."""
        if self.kind != "P":
            return None
        value: Value = True if self.register is None else values.get(self.register)
        return None if value is None else bool(value) != self.inverted

    def number(self, values: Mapping[str, Value], bank: Mapping[int, int], wide: bool = False) -> int | None:
        """Its value as an unsigned number of 32 or 64 bits."""
        if self.absolute:
            return None
        value: int | None
        if self.immediate is not None:
            value = self.immediate
        elif self.bank is not None:
            place = self.constant(values)
            if place is None:
                return None
            value = bank.get(place, 0) | (bank.get(place + 4, 0) << 32 if wide else 0)
        elif self.register is None:
            value = 0
        else:
            low, *high = following(self.register, 2 if wide else 1)
            parts = [values.get(name) for name in (low, *high)]
            if any(part is None for part in parts):
                return None
            value = sum(int(part or 0) << 32 * i for i, part in enumerate(parts))
        limit = WIDE if wide else MASK
        if self.inverted:
            value = ~value
        return (-value if self.negative else value) & limit

    def constant(self, values: Mapping[str, Value]) -> int | None:
        """Where in the constant bank it lies."""
        if self.bank is None or self.register is None:
            return self.bank
        index = values.get(self.register)
        return None if index is None else self.bank + int(index)

    def address(self, values: Mapping[str, Value]) -> int | None:
        """Of memory, in 64 bits."""
        total = self.immediate or 0
        for name in (self.register, self.second):
            if name is None:
                continue
            low, high = following(name, 2)
            parts = values.get(low), values.get(high)
            if parts[0] is None or parts[1] is None:
                return None
            total += int(parts[0]) + (int(parts[1]) << 32)
        return total

    def offset(self, values: Mapping[str, Value]) -> int | None:
        """In shared memory, in 32 bits."""
        total = self.immediate or 0
        for name in (self.register, self.second):
            value = 0 if name is None else values.get(name)
            if value is None:
                return None
            total += int(value)
        return total & MASK


@functools.cache
def following(register: str, count: int) -> list[str]:
    """Names of `count` registers in a row."""
    match = _REGISTER.match(register)
    assert match is not None
    return [f"{match[1]}{match[2]}{int(match[3]) + i}" for i in range(count)]


def float_bits(value: float, size: int = 32) -> int:
    """The bits of a number as an fp16, fp32 or the upper half of an fp64."""
    kind, of = {16: ("<e", "<H"), 32: ("<f", "<I"), 64: ("<d", "<Q")}[size]
    try:
        return int(struct.unpack(of, struct.pack(kind, value))[0])
    except OverflowError:
        return float_bits(math.inf, size)


def bits_float(bits: int) -> float:
    """The fp32 number of some bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits & MASK))[0])


@functools.cache
def parse(text: str) -> Operand:
    """An operand from its text."""
    body = text.removesuffix(".reuse")
    if "[" in body and not body.lstrip("-~|!").startswith("c["):
        inside = body[body.rindex("[") + 1 : body.rindex("]")]
        names = [part.split(".")[0] for part in re.split(r"[+]", inside) if re.match(r"U?R\d", part)]
        numbers = [int(part, 16) for part in re.findall(r"-?0x[0-9a-f]+", inside)]
        first, second = (*names, None, None)[:2]
        return Operand(text, first, "R", memory=True, immediate=sum(numbers), second=second)
    negative = inverted = absolute = False
    while body[:1] in "-~!|" and body:
        if body[0] == "-" and (_NUMBER.match(body) or _FLOAT.match(body)):
            break
        negative |= body[0] == "-"
        inverted |= body[0] in "~!"
        absolute |= body[0] == "|"
        body = body[1:].removesuffix("|") if body[0] == "|" else body[1:]
    flags = {"negative": negative, "inverted": inverted, "absolute": absolute}
    body = body.removesuffix(".reuse").removesuffix("|")
    if constant := _CONSTANT.match(body):
        inner = constant[2] if constant[2] and not constant[2].endswith("RZ") else None
        if int(constant[1], 16) == 0:
            return Operand(text, inner, "R", bank=int(constant[3] or "0x0", 16), **flags)
        return Operand(text, None, "?", absolute=True)
    name = body.split(".")[0]
    if match := _REGISTER.match(name):
        fixed = match[3] in "ZT"
        return Operand(text, None if fixed else name, "P" if match[2] == "P" else "R", **flags)
    if _NUMBER.match(body):
        return Operand(text, None, "I", immediate=int(body, 0) & WIDE, **flags)
    if _FLOAT.match(body):
        word = body.upper().replace("QNAN", "NAN").replace("SNAN", "NAN")
        return Operand(text, None, "F", immediate=float_bits(float(word)), **flags)
    return Operand(text, None, "SR" if body.startswith("SR") else "?", immediate=0 if body == "SRZ" else None)


def signed(value: int, bits: int = 32) -> int:
    """Two's complement."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def combined(a: Value, b: Value, *, both: bool) -> Value:
    """And, or or, of what may be unknown."""
    if both:
        return False if a is False or b is False else None if None in (a, b) else True
    return True if a is True or b is True else None if None in (a, b) else False


def lookup(a: int | None, b: int | None, c: int | None, table: int) -> int | None:
    """A function of three bits on all 32; unknown bits may not matter."""
    ways = [(0, MASK) if value is None else (value,) for value in (a, b, c)]
    results = set()
    for x, y, z in itertools.product(*ways):
        result = 0
        for row in range(8):
            if table >> row & 1:
                result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        results.add(result & MASK)
    return results.pop() if len(results) == 1 else None


class Decoded:
    """What the parts of an instruction are: its result, further outputs, sources."""

    def __init__(self, name: str, modifiers: tuple[str, ...], operands: Sequence[Operand]) -> None:
        self.name = name[1:] if name[0] == "U" and name not in ("UCGABAR_ARV", "UCGABAR_WAIT") else name
        self.modifiers = modifiers
        # Predicates before the register are outputs; predicates behind the sources are inputs.
        split = 0
        while split < len(operands) and operands[split].kind == "P":
            split += 1
        self.target: Operand | None
        if self.name in ("ISETP", "FSETP", "DSETP", "PLOP3", "HSETP2"):
            self.target, self.outputs, rest = None, list(operands[:2]), list(operands[2:])
        else:
            self.target = operands[split] if split < len(operands) else None
            self.outputs, rest = list(operands[:split]), list(operands[split + 1 :])
            while rest and rest[0].kind == "P" and self.name in ("IADD3", "LEA", "LOP3", "IMAD", "VIMNMX"):
                self.outputs.append(rest.pop(0))
        self.sources = rest
        self.predicates = [operand for operand in rest if operand.kind == "P"]
        self.plain = [operand for operand in rest if operand.kind != "P" and operand.text != "PR"]
        self.wide = any(part in ("64", "S64", "U64") for part in modifiers)


class Step:
    """One instruction on the values before it."""

    def __init__(
        self, decoded: Decoded, values: Mapping[str, Value], bank: Mapping[int, int], special: Mapping[str, int]
    ) -> None:
        self.name, self.modifiers, self.wide = decoded.name, decoded.modifiers, decoded.wide
        self.target, self.outputs, self.sources = decoded.target, decoded.outputs, decoded.sources
        self.predicates, self.plain = decoded.predicates, decoded.plain
        self.values, self.bank, self.special = values, bank, special
        self.results: dict[str, Value] = {}

    def numbers(self, wide: bool = False) -> list[int | None]:
        """Sources that are no predicates."""
        return [operand.number(self.values, self.bank, wide) for operand in self.plain]

    def truths(self) -> list[Value]:
        """Predicate sources."""
        return [operand.truth(self.values) for operand in self.predicates]

    def put(self, value: int | None, wide: bool = False) -> None:
        """The result."""
        if self.target is None or self.target.register is None:
            return
        for i, register in enumerate(following(self.target.register, 2 if wide else 1)):
            self.results[register] = None if value is None else value >> 32 * i & MASK

    def tell(self, place: int, value: Value) -> None:
        """A predicate result."""
        if place < len(self.outputs) and self.outputs[place].register is not None:
            self.results[self.outputs[place].register or ""] = value
