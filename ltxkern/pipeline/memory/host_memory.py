"""Host memory: what is free within the control group, a budget for what the manager keeps there, and pinning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_UNLIMITED = 1 << 60


class HostBudgetError(MemoryError):
    """The host has no room for what would be kept there; says how much was asked and how much is left."""


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_folders(root: Path, membership: Path) -> list[tuple[Path, str, str]]:
    """(folder, limit file, usage file) of this process's memory control groups, innermost first."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, files = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Within a container the path named here may not be mounted; its own root then carries the limit.
        folder = base / name.lstrip("/")
        while True:
            found.append((folder, *files))
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    return found


def cgroup_available(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the process's memory control groups (version 1 or 2) still allow, or None where they set no limit.

    Page cache that the kernel gives back under pressure counts as available.
    """
    rooms = []
    for folder, limit_name, usage_name in _cgroup_folders(root, membership):
        limit, usage = _read_number(folder / limit_name), _read_number(folder / usage_name)
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        rooms.append(max(0, limit - usage + _inactive_file(folder)))
    return min(rooms, default=None)


def _inactive_file(folder: Path) -> int:
    try:
        fields = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def host_available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of host memory that can still be taken: the kernel's estimate, and no more than the control group allows."""
    free = _UNLIMITED
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        logger.warning("%s does not tell the free memory; the host counts as unlimited", meminfo)
    allowed = cgroup_available()
    return free if allowed is None else min(free, allowed)


def device_available(device: torch.device) -> int:
    """Bytes that can still be taken on a device, measured now; memory that torch holds without use counts as free."""
    if device.type != "cuda":
        return host_available()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_bytes(nbytes: int) -> int:
    """What a host tensor of so many bytes takes: torch rounds page-locked memory up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes and torch.cuda.is_available() else nbytes


class HostBudget:
    """Counts the bytes that the manager keeps on the host, and refuses to exceed the limit.

    Args:
        limit: bytes, or None: nine tenths of what is free and of what has been taken already.
        allocate: called with (shape, dtype); returns a page-locked host tensor where there is a GPU.
    """

    def __init__(
        self, limit: int | None = None, allocate: Callable[[torch.Size, torch.dtype], Tensor] | None = None
    ) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"host_budget_bytes must be at least 0, got {limit}")
        self._limit = limit
        self._allocate = allocate or _allocate_pinned
        self.used = 0

    @property
    def available(self) -> int:
        """Bytes that may still be taken."""
        limit = int(0.9 * (host_available() + self.used)) if self._limit is None else self._limit
        return limit - self.used

    def take(self, shape: torch.Size, dtype: torch.dtype, what: str) -> Tensor:
        """A host tensor counted against the budget.

        Raises:
            HostBudgetError: the budget, or the host itself, has no room.
        """
        nbytes = host_bytes(shape.numel() * dtype.itemsize)
        if nbytes > self.available:
            raise HostBudgetError(
                f"{what} needs {nbytes} bytes of host memory and {max(0, self.available)} are left: "
                'raise host_budget_bytes, or use device mode "inplace" or "original"'
            )
        try:
            tensor = self._allocate(shape, dtype)
        except RuntimeError as error:
            raise HostBudgetError(f"{what}: the host gave no {nbytes} bytes ({str(error).splitlines()[0]})") from error
        self.used += nbytes
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """Uncounts a tensor that `take` handed out."""
        self.used -= host_bytes(tensor.nbytes)


def _allocate_pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
