"""What the instructions that move integers, addresses and predicates compute; the results of all others are unknown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from operands import MASK, WIDE, Decoded, Step, Value, bits_float, combined, float_bits, following, lookup, signed

# Clocks until a result can be used; 5 of any other instruction. Shuffles, shared memory and special functions take longer.
LATENCIES = {
    "SHFL": 24,
    "LDS": 30,
    "LDSM": 33,
    "MUFU": 20,
    "BAR": 30,
    "LDC": 30,
    "F2F": 20,
    "F2I": 20,
    "I2F": 20,
    "S2R": 20,
    "S2UR": 20,
    "HMMA": 33,
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP"), 16),
}


def _move(step: Step) -> None:
    (value, *_) = step.numbers(step.wide)
    step.put(value, step.wide)


def _convert_special(step: Step) -> None:
    source = step.sources[0].text
    wide = step.name == "CS2R" and "32" not in step.modifiers
    step.put(0 if source == "SRZ" else step.special.get(source, 0), wide)


def _multiply_add(step: Step) -> None:
    a, b, c = step.numbers()[:3]
    high, wide = "HI" in step.modifiers, "WIDE" in step.modifiers
    if high or wide:
        c = step.plain[2].number(step.values, step.bank, True)
    if a is None or b is None or c is None:
        # 0 * unknown + c and the like are moves.
        known = [x for x in (a, b) if x is not None]
        product = 0 if 0 in known and c is not None else None
        if product is None or c is None:
            step.put(None, wide)
            return
    else:
        if (high or wide) and "U32" not in step.modifiers:
            a, b = signed(a), signed(b)
        product = a * b
    carry = 0
    if "X" in step.modifiers:
        truths = step.truths()
        if None in truths[:1]:
            step.put(None, wide)
            return
        carry = int(bool(truths[0])) if truths else 0
    assert c is not None
    total = product + c + carry
    if wide:
        step.tell(0, bool(total >> 64 & 1))
        step.put(total & WIDE, True)
    elif high:
        step.put(total >> 32 & MASK)
    else:
        step.put(total & MASK)


def _sum(step: Step) -> None:
    wide = step.wide
    raw: list[int] = []
    for operand in step.plain:
        value = operand.number(step.values, step.bank, wide)
        if value is None:
            step.put(None, wide)
            for place in range(len(step.outputs)):
                step.tell(place, None)
            return
        # A carry out of a difference says that there was no borrow, of minus nothing too.
        whole = 1 << (64 if wide else 32)
        raw.append(whole if operand.negative and value == 0 else value)
    total = sum(raw)
    if "X" in step.modifiers:
        for truth in step.truths():
            if truth is None:
                step.put(None, wide)
                return
            total += int(bool(truth))
    bits = 64 if wide else 32
    for place in range(len(step.outputs)):
        step.tell(place, total >> bits > place)
    step.put(total & (WIDE if wide else MASK), wide)


def _extreme(step: Step) -> None:
    numbers, truths = step.numbers(step.wide), step.truths()
    if step.name == "VIADDMNMX":
        a, b, c = numbers[:3]
        numbers = [None if a is None or b is None else (a + b) & MASK, c]
    if None in numbers:
        step.put(None, step.wide)
        return
    bits = 64 if step.wide else 32
    unsigned = any(part in ("U32", "U64") for part in step.modifiers)
    known = [number if unsigned else signed(number, bits) for number in numbers if number is not None]
    least = truths[0] if truths else True
    step.put((min if least else max)(known) & (WIDE if step.wide else MASK), step.wide)


def _shift_add(step: Step) -> None:
    numbers = step.numbers()
    shift = numbers[-1]
    a, b = numbers[0], numbers[1]
    truths = step.truths()
    if a is None or b is None or shift is None or None in truths:
        step.put(None)
        step.tell(0, None)
        return
    carry = int(bool(truths[0])) if truths and "X" in step.modifiers else 0
    if "HI" in step.modifiers:
        c = numbers[2] if len(numbers) > 3 else (MASK if "SX32" in step.modifiers and a >> 31 else 0)
        if c is None:
            step.put(None)
            return
        total = ((c << 32 | a) << shift >> 32 & MASK) + b + carry
    else:
        total = (a << shift & MASK) + b + carry
    step.tell(0, total > MASK)
    step.put(total & MASK)


def _logic(step: Step) -> None:
    a, b, c, table = [*step.numbers(), 0][:4]
    result = lookup(a, b, c, table or 0)
    step.put(result)
    step.tell(0, None if result is None else result != 0)


def _predicate_logic(step: Step) -> None:
    truths = step.truths()[:3]
    tables = [operand.immediate or 0 for operand in step.sources if operand.kind == "I"]
    for place, table in enumerate(tables[:2]):
        known = [None if truth is None else MASK * bool(truth) for truth in (*truths, True, True, True)[:3]]
        result = lookup(known[0], known[1], known[2], table)
        step.tell(place, None if result is None else result != 0)


def _shift(step: Step) -> None:
    low, by, high = step.numbers()[:3]
    names = step.modifiers
    left, upper, sixty_four = "L" in names, "HI" in names, "U64" in names or "S64" in names
    if by is None:
        step.put(None)
        return
    by = by & (63 if sixty_four else 31) if "W" in names else min(by, 63 if sixty_four else 32)
    if left and not upper:
        step.put(None if low is None else low << by & MASK)
    elif left:
        step.put(None if low is None or high is None else (high << 32 | low) << by >> 32 & MASK)
    elif upper:
        step.put(None if high is None else (signed(high) if any(n[0] == "S" for n in names) else high) >> by & MASK)
    elif high == 0 and by >= 32:
        step.put(0)
    else:
        both = None if low is None or high is None else high << 32 | low
        if both is not None and "S64" in names:
            both = signed(both, 64)
        step.put(None if both is None else both >> by & MASK)


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def _compare(step: Step) -> None:
    kind = step.modifiers[0]
    a, b = step.numbers(step.wide)[:2]
    truths = step.truths()
    with_, before = truths[0] if truths else True, truths[1] if len(truths) > 1 else None
    result: Value = None
    if kind in ("T", "F"):
        result = kind == "T"
    elif a is not None and b is not None:
        if not any(part in ("U32", "U64") for part in step.modifiers):
            a, b = signed(a, 64 if step.wide else 32), signed(b, 64 if step.wide else 32)
        result = _COMPARE[kind](a, b)
        if "EX" in step.modifiers:
            # The comparison of the lower halves decides where the upper ones are equal.
            if a == b:
                result = before
            elif kind in ("GE", "LE"):
                result = _COMPARE["GT" if kind == "GE" else "LT"](a, b)
    both = "AND" in step.modifiers
    for place, value in enumerate((result, None if result is None else not result)):
        step.tell(place, combined(value, with_, both=both))


def _select(step: Step) -> None:
    a, b = step.numbers(step.wide)[:2]
    (truth, *_) = step.truths()
    step.put((a if truth else b) if truth is not None else a if a == b else None, step.wide)


def _permute(step: Step) -> None:
    a, selector, b = step.numbers()[:3]
    if a is None or b is None or selector is None:
        step.put(None)
        return
    both, result = b << 32 | a, 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = both >> 8 * (pick & 7) & 255
        result |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    step.put(result)


def _float_math(step: Step) -> None:
    """Only what divisions of integers are made of."""
    numbers = step.numbers(wide=step.name == "I2F" and step.wide)
    if None in numbers:
        step.put(None)
        return
    (a, *_) = (number for number in numbers if number is not None)
    if step.name in ("I2F", "I2FP"):
        unsigned = any(part in ("U32", "U64") for part in step.modifiers)
        if step.name == "I2F" and "F64" in step.modifiers:
            step.put(float_bits(float(a), 64), True)
        else:
            step.put(float_bits(float(a if unsigned else signed(a, 64 if step.wide else 32))))
    elif step.name == "F2I":
        value = bits_float(a)
        step.put(int(value) if math.isfinite(value) else 0, step.wide)
    elif step.name == "MUFU" and "RCP" in step.modifiers:
        value = bits_float(a)
        step.put(float_bits(1 / value if value else math.inf))
    else:
        step.put(None, step.wide or "RCP64H" in step.modifiers)


def _pair_of_halves(step: Step) -> None:
    """Constants are made as 0 * 0 + (high, low)."""
    operands = step.sources
    if (
        len(operands) == 4
        and operands[2].kind in "FI"
        and operands[3].kind in "FI"
        and all(o.register is None for o in operands)
    ):
        high, low = (float(operand.text.upper().replace("QNAN", "NAN")) for operand in operands[2:])
        step.put(float_bits(high, 16) << 16 | float_bits(low, 16))
    else:
        step.put(None)


def _vote(step: Step) -> None:
    step.put(1)
    step.tell(0, None)


def _own(step: Step) -> None:
    """A shuffle: as if all threads had the same."""
    step.put(step.numbers()[0])
    step.tell(0, True)


def _load_constant(step: Step) -> None:
    count = 4 if "128" in step.modifiers else 2 if "64" in step.modifiers else 1
    place = step.sources[0]
    if step.target is None or step.target.register is None:
        return
    base = place.constant(step.values)
    for i, register in enumerate(following(step.target.register, count)):
        word = None if base is None else step.bank.get((base + 4 * i) // 4 * 4, 0)
        if word is not None and "U8" in step.modifiers:
            word = word >> 8 * ((base or 0) % 4) & 255
        step.results[register] = word


def _count_bits(step: Step) -> None:
    (a, *_) = step.numbers()
    if a is None:
        step.put(None)
    elif step.name == "POPC":
        step.put(a.bit_count())
    else:
        step.put((a.bit_length() - 1) & MASK)


def _absolute(step: Step) -> None:
    (a, *_) = step.numbers()
    step.put(None if a is None else abs(signed(a)) & MASK)


def _extend(step: Step) -> None:
    a, bits = step.numbers()[:2]
    if a is None or not bits:
        step.put(None)
        return
    low = a & (1 << bits) - 1
    step.put(low if "U32" in step.modifiers else signed(low, bits) & MASK)


def _pack_predicates(step: Step) -> None:
    before, mask = step.numbers()[-2:]
    truths = [step.values.get(f"P{i}") if (mask or 0) >> i & 1 else False for i in range(7)]
    if before is None or mask is None or None in truths:
        step.put(None)
    else:
        step.put(before & ~mask & MASK | sum(1 << i for i, truth in enumerate(truths) if truth))


def _unpack_predicates(step: Step) -> None:
    value, mask = step.numbers()[:2]
    for i in range(7):
        if (mask or 0) >> i & 1:
            step.results[f"P{i}"] = None if value is None else bool(value >> i & 1)


_OPERATIONS: dict[str, Callable[[Step], None]] = {
    **dict.fromkeys(("MOV", "R2UR", "MOV32I"), _move),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _convert_special),
    **dict.fromkeys(("IMAD",), _multiply_add),
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), _sum),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX"), _extreme),
    "LEA": _shift_add,
    "LOP3": _logic,
    "PLOP3": _predicate_logic,
    "SHF": _shift,
    "ISETP": _compare,
    **dict.fromkeys(("SEL", "FSEL"), _select),
    "PRMT": _permute,
    **dict.fromkeys(("I2F", "I2FP", "F2I", "MUFU"), _float_math),
    "HFMA2": _pair_of_halves,
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    "SHFL": _own,
    **dict.fromkeys(("LDC", "LDCU"), _load_constant),
    **dict.fromkeys(("POPC", "FLO"), _count_bits),
    "IABS": _absolute,
    "SGXT": _extend,
    "P2R": _pack_predicates,
    "R2P": _unpack_predicates,
}
# Registers of a result where it is not one: by the name, and else two of whatever is wide.
_RESULTS = {"LDSM": 4, "HMMA": 4, "QMMA": 4, "ATOMG": 1, "ATOM": 1}
_NOTHING = (
    "STG", "STS", "STSM", "ST", "STL", "RED", "CCTL", "NANOSLEEP", "LDGSTS", "UCGABAR_ARV", "UCGABAR_WAIT", "CGAERRBAR",
)  # fmt: skip


def unknown(decoded: Decoded) -> Mapping[str, Value] | None:
    """The registers and predicates of an instruction that leaves all of them unknown; None for one that computes."""
    name = decoded.name
    if name in _NOTHING:
        return {}
    if name in _OPERATIONS:
        return None
    if name in ("LDS", "LDL"):
        count = next((n for part, n in (("128", 4), ("64", 2)) if part in decoded.modifiers), 1)
    else:
        double = name[0] == "D" or (decoded.modifiers[:1] == ("F64",) and name in ("F2F", "I2F"))
        count = _RESULTS.get(name, 2 if double or decoded.wide else 1)
    target = (
        [] if decoded.target is None or decoded.target.register is None else following(decoded.target.register, count)
    )
    return dict.fromkeys([*target, *(operand.register for operand in decoded.outputs if operand.register is not None)])


def evaluate(step: Step) -> dict[str, Value]:
    """Registers and predicates that an instruction writes; None what it leaves unknown."""
    _OPERATIONS[step.name](step)
    for operand in step.outputs:
        if operand.register is not None:
            step.results.setdefault(operand.register, None)
    return step.results
