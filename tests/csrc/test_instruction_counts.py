"""Instructions of the hot paths stay at the baseline, within the goals and without spills; the paths themselves are found."""

import json

import pytest

from tests.csrc import instruction_counts, kernel_resources
from tests.csrc.instruction_counts import Instruction, blocks, hot_path

# Another version of the compiler may take a few more.
SLACK = 1.03
# At most, for 16 bytes of bf16 on sm_90: beyond it instructions bind before bytes do.
GOALS = {
    "ltxk::rms_norm_modulate_packs<ltxk::bf16, ltxk::bf16, false>": 95,
    "ltxk::rms_norm_modulate_packs<ltxk::bf16, ltxk::bf16, true>": 145,
    "ltxk::qk_norm_rope_packs<ltxk::bf16, float>": 115,
    "ltxk::qk_norm_rope_packs<ltxk::bf16, ltxk::bf16>": 115,
    "ltxk::gated_residual_packs<ltxk::bf16, ltxk::bf16>": 75,
    "ltxk::head_gate_packs<ltxk::bf16, ltxk::bf16>": 80,
}
# 32 warps of them fit a multiprocessor.
REGISTERS = 64


def program(*lines: str) -> list[Instruction]:
    """Instructions at addresses 0, 16, ...: "@P0 BRA 0x30"."""
    made = []
    for at, line in enumerate(lines):
        predicate, rest = line.split(" ", 1) if line.startswith("@") else (None, line)
        name, _, operands = rest.partition(" ")
        made.append(Instruction(16 * at, predicate, name, operands))
    return made


def test_the_path_of_most_wide_accesses_is_taken() -> None:
    early_exit = program(
        "ISETP", "@P0 EXIT", "LDG.E.128 R0", "@P1 BRA 0x60", "MUFU.RCP", "CALL 0x200", "STG.E.128 R0", "EXIT"
    )
    assert hot_path(early_exit)._asdict() == {"wide": 2, "issue": 6, "mufu": 0, "lsu": 2, "shared": 0}
    assert [block.follows for block in blocks(early_exit)] == [(None, 1), (3, 2), (3,), (None,)]


def test_a_loop_counts_once() -> None:
    loop = program("MOV", "LDG.E.128 R0", "FADD", "@P0 BRA 0x10", "SHFL.BFLY", "@P1 BRA 0x40", "STS", "EXIT")
    assert hot_path(loop).issue == 8
    assert hot_path(loop).wide == 1


def test_no_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="no path"):
        hot_path(program("MOV", "BRA 0x0"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", instruction_counts.ARCHITECTURES)
def test_row_kernels(architecture: str) -> None:
    pytest.importorskip("cupy", reason="INSTRUCTIONS NOT TESTED: pip install 'ltxkern[cuda13]'")
    kernel_resources.require_nvrtc("INSTRUCTIONS")
    baseline = json.loads(instruction_counts.BASELINE.read_text())[architecture]
    counted: dict[str, dict[str, float]] = {}
    for kernels in instruction_counts.counted_kernels().values():
        counted |= instruction_counts.count(kernels, architecture)
        for kernel, row in kernel_resources.measure(kernels, architecture).items():
            assert row["stack"] == row["local"] == 0, f"{kernel} spills: {row}"
            assert row["registers"] <= REGISTERS, f"{kernel}: {row}"
    assert counted.keys() == baseline.keys(), "run python -m tests.csrc.instruction_counts"
    for kernel, row in counted.items():
        for name, value in row.items():
            assert value <= SLACK * baseline[kernel][name], f"{kernel}: {name} {value} against {baseline[kernel][name]}"
        assert row["wide"] >= baseline[kernel]["wide"]
    if architecture == "sm_90":
        for kernel, most in GOALS.items():
            assert counted[kernel]["issue"] <= most, f"{kernel}: {counted[kernel]}"
