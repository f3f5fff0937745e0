"""Host memory: control groups, and a budget that counts and refuses."""

import pytest
import torch

from ltxkern.pipeline.memory import host_memory
from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError, cgroup_available


class TestHostMemory:
    def test_a_budget_counts_and_refuses(self):
        budget = HostBudget(100)
        tensor = budget.take(torch.Size([20]), torch.float32, "this")
        with pytest.raises(HostBudgetError, match="that needs 40 bytes of host memory and 20 are left"):
            budget.take(torch.Size([10]), torch.float32, "that")
        budget.give_back(tensor)
        assert budget.available == 100

    def test_without_a_limit_many_small_pieces_leave_a_tenth_free(self, monkeypatch):
        total, taken = 1000, []

        def allocate(shape, dtype):
            taken.append(shape.numel())
            return torch.empty(shape, dtype=dtype)

        monkeypatch.setattr(host_memory, "host_available", lambda: total - sum(taken))
        budget = HostBudget(None, allocate)
        for _ in range(90):
            budget.take(torch.Size([10]), torch.uint8, "a piece")
        with pytest.raises(HostBudgetError, match="and 0 are left"):
            budget.take(torch.Size([10]), torch.uint8, "a piece")
        assert sum(taken) == 900

    def test_page_locked_memory_counts_as_torch_takes_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        budget = HostBudget(1000, lambda shape, dtype: torch.empty(shape, dtype=dtype))
        tensor = budget.take(torch.Size([129]), torch.uint8, "this")
        assert budget.used == 256
        budget.give_back(tensor)
        assert budget.used == 0

    def test_a_host_that_gives_nothing_is_a_budget_error(self):
        def allocate(shape, dtype):
            raise RuntimeError("CUDA error: out of memory\nmore")

        budget = HostBudget(1000, allocate)
        with pytest.raises(HostBudgetError, match=r"the host gave no 4 bytes .CUDA error: out of memory.$"):
            budget.take(torch.Size([1]), torch.float32, "this")
        assert budget.used == 0

    @pytest.mark.parametrize("version", [1, 2])
    def test_control_groups_bound_the_host(self, tmp_path, version):
        membership = tmp_path / "membership"
        if version == 2:
            membership.write_text("0::/a/b\n")
            root, names = tmp_path / "fs", ("memory.max", "memory.current", "inactive_file")
            outer, inner = root / "a", root / "a" / "b"
        else:
            membership.write_text("5:cpu:/x\n4:memory:/a/b\n")
            root, names = tmp_path / "fs", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            outer, inner = root / "memory" / "a", root / "memory" / "a" / "b"
        inner.mkdir(parents=True)
        assert cgroup_available(root, membership) is None
        (inner / names[0]).write_text("max\n" if version == 2 else str(2**63 - 4096))
        (inner / names[1]).write_text("10\n")
        assert cgroup_available(root, membership) is None
        (outer / names[0]).write_text("1000\n")
        (outer / names[1]).write_text("700\n")
        (outer / "memory.stat").write_text(f"anon 5\n{names[2]} 50\n")
        assert cgroup_available(root, membership) == 350
        (inner / names[0]).write_text("100\n")
        assert cgroup_available(root, membership) == 90

    def test_the_host_is_bounded_by_both(self, tmp_path, monkeypatch):
        meminfo = tmp_path / "meminfo"
        meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 40 kB\n")
        monkeypatch.setattr(host_memory, "cgroup_available", lambda: None)
        assert host_memory.host_available(meminfo) == 40 * 1024
        monkeypatch.setattr(host_memory, "cgroup_available", lambda: 77)
        assert host_memory.host_available(meminfo) == 77
