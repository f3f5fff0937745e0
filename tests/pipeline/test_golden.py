"""Every group of golden.safetensors that is part of the product, against the official numbers.

The checks live in golden_<area>.py beside this file and walk the keys they find; LTXKERN_GOLDEN names another file of the same
layout. A group without any key, or without an area that covers it, fails here.
"""

from types import ModuleType

import pytest

from tests.golden import open_golden
from tests.pipeline import golden_hq, golden_layout, golden_ops, golden_sampler, golden_transformer

AREAS: tuple[ModuleType, ...] = (golden_sampler, golden_ops, golden_layout, golden_transformer, golden_hq)

CHECKED = (
    "sched/ltx2/", "sched/ltx2_nostretch/", "sched/ltx2_term", "sched/ltx2_shift/", "sched/const/", "res2s/coeffs/",
    "res2s/step_sizes/", "res2s/sub_sigmas/", "sde/coeff_up/", "sde/coeff_down/", "sde/step/", "euler/", "noise/new_noise/",
    "noise/channelwise/", "guider/v/", "guider/a/", "guider/b2/", "loop/sigmas/", "loop/init/", "loop/case/",
    "loop/euler_", "lora/fused/", "lora/exact_f64/", "lora/exact_f64_from_bf16/", "gnsilu/", "helpers/",
    "layout/", "rope/", "cond/", "upsampler/", "transformer/velocity/", "hq/",
)  # fmt: skip

for area in AREAS:
    stem = area.__name__.rsplit(".", 1)[-1].removeprefix("golden_")
    for check_name, check in list(vars(area).items()):
        if check_name.startswith("test_") and getattr(check, "__module__", None) == area.__name__:
            globals()[f"test_{stem}_{check_name.removeprefix('test_')}"] = check


@pytest.mark.parametrize("group", CHECKED)
def test_group_is_there_and_checked(group: str) -> None:
    assert open_golden().keys(group)
    covering = [area.__name__ for area in AREAS if any(group.startswith(prefix) for prefix in area.COVERS)]
    assert covering, f"no area checks {group}"
