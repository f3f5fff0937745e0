"""Modules that are lent to the device: storages move once, a failure moves nothing, page-locked copies are kept."""

import pytest
import torch
from torch import nn

from ltxkern.pipeline.memory.host_copy import HostCopy, Lender, storages
from ltxkern.pipeline.memory.host_memory import HostBudget
from tests.pipeline.memory.lora_models import Shared


def test_shared_storages_are_counted_and_moved_once():
    module = Shared()
    assert [storage.nbytes() for storage in storages(module).values()] == [48]
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    home = module.first.data_ptr()
    copy_of = HostCopy(module, HostBudget(0), pin=False)
    # Another place on the same machine: "cpu:0" differs from "cpu", so that the storages are really copied.
    copy_of.lend(torch.device("cpu", 0))
    assert module.first.data_ptr() != home
    assert module.tied is module.first
    assert len(storages(module)) == 1
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    module.first.data[0, 0] = 99
    copy_of.take_home()
    assert module.first.data_ptr() == home
    assert module.first[0, 0] == 0


def test_a_failure_while_moving_leaves_the_module_at_home(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    home = [parameter.data_ptr() for parameter in module.parameters()]
    copies = HostCopy(module, HostBudget(0), pin=False)
    real, calls = torch.empty, iter(range(100))

    def empty(*args, **kwargs):
        if kwargs.get("dtype") is torch.uint8 and next(calls) == 2:
            raise torch.cuda.OutOfMemoryError("full")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        copies.lend(torch.device("cpu", 0))
    assert [parameter.data_ptr() for parameter in module.parameters()] == home


class TestLender:
    """Another place on the same machine stands for the device: "cpu:0" differs from "cpu", so that storages are copied."""

    @pytest.fixture
    def lender(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.UntypedStorage, "is_pinned", lambda self, device="cuda": False)
        self.taken = []

        def allocate(shape, dtype):
            self.taken.append(shape.numel())
            return torch.empty(shape, dtype=dtype)

        made = Lender(torch.device("meta"), HostBudget(10_000, allocate))
        made._device = torch.device("cpu", 0)
        # Modules on the host do not count as being there.
        monkeypatch.setattr("ltxkern.pipeline.memory.host_copy._is_on", lambda module, device: False)
        return made

    def test_a_module_that_comes_again_is_pinned_once(self, lender):
        module = nn.Linear(8, 8)
        before = module.weight.detach().clone()
        for _ in range(3):
            with lender.lent("part", module, keep=False):
                assert torch.equal(module.weight, before)
        assert len(self.taken) == 2
        assert lender._budget.used > 0
        lender.close()
        assert lender._budget.used == 0
        assert torch.equal(module.weight, before)

    def test_another_module_or_other_weights_take_its_place(self, lender):
        first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        with lender.lent("part", first, keep=False):
            pass
        used = lender._budget.used
        with lender.lent("part", second, keep=False):
            pass
        assert lender._budget.used == used
        second.weight.data = torch.ones(8, 8)
        with lender.lent("part", second, keep=False):
            assert second.weight.sum() == 64
        assert lender._budget.used == used

    def test_what_comes_once_or_has_no_room_stays_pageable(self, lender):
        with lender.lent("text", nn.Linear(8, 8), keep=False, once=True):
            pass
        assert not lender._copies
        with lender.lent("large", nn.Linear(80, 80), keep=False):
            pass
        assert lender._budget.used == 0

    def test_what_is_kept_comes_home_at_the_end_and_after_an_error(self, lender):
        module = nn.Linear(8, 8)
        with lender.lent("part", module, keep=True):
            there = module.weight.data_ptr()
        assert module.weight.data_ptr() == there
        lender.close()
        assert module.weight.data_ptr() != there

        def fail():
            with lender.lent("part", module, keep=True):
                assert module.weight.data_ptr() != home
                raise KeyError

        home = module.weight.data_ptr()
        with pytest.raises(KeyError):
            fail()
        assert lender._copies["part"].is_home()


def test_modules_without_weights_can_be_lent():
    with Lender(torch.device("cpu"), HostBudget(0)).lent("nothing", nn.Identity(), keep=False):
        pass
