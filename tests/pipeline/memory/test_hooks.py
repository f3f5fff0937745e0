"""Hooks around forwards: their order, other submodules in place of those followed, none left behind."""

import torch
from torch import nn

from ltxkern.pipeline.memory.hooks import ForwardHooks


def test_callbacks_come_in_order_until_they_are_removed():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen = []
    hooks = ForwardHooks(module, lambda: seen.append("before"), lambda: seen.append("after"))
    for names in (["0", "1"], ["1"]):
        hooks.follow(names, lambda name: seen.append(f"before {name}"), lambda name: seen.append(f"after {name}"))
        module(torch.ones(1, 2))
        inner = [f"{when} {name}" for name in names for when in ("before", "after")]
        assert seen == ["before", *inner, "after"]
        seen.clear()
    hooks.remove()
    module(torch.ones(1, 2))
    assert seen == []
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_forward_gives_what_it_gives_without_hooks():
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    expected = module(x)
    ForwardHooks(module, lambda: None, lambda: None)
    assert torch.equal(module(x), expected)
