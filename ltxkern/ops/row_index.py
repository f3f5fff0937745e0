"""A row index: which row of its modulation tables each row of x takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ltxkern.compiled.rows import check_range
from ltxkern.ops.checks import ACTIVATION_DTYPES, check_device, check_integer_tensor, check_shape, check_tensor


def taken(rows: Tensor | None, *tables: Tensor) -> tuple[Tensor, ...]:
    """Each table (N, D) as (..., D) by `rows (...)`: what the kernels take without writing it. Unchanged without rows.

    Raises:
        ValueError: an index on the host that is no row of the tables.
    """
    if rows is None:
        return tables
    check_range(rows, tables[0].shape[0])
    return tuple(F.embedding(rows, table) for table in tables)


def check_indexed(x: Tensor, rows: Tensor, tables: Mapping[str, Tensor]) -> None:
    """`rows` has one index per row of x, and the tables are (N, D) of one N."""
    check_integer_tensor("rows", rows)
    check_device("rows", rows, x.device)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimensions with rows, got shape ()")
    check_shape("rows", rows, x.shape[:-1])
    first = ""
    for name, table in tables.items():
        check_tensor(name, table, dtypes=ACTIVATION_DTYPES)
        check_device(name, table, x.device)
        if table.dim() != 2 or table.shape[-1] != x.shape[-1]:
            raise ValueError(f"{name} must have shape (N, {x.shape[-1]}) with rows, got {tuple(table.shape)}")
        if first and table.shape[0] != tables[first].shape[0]:
            raise ValueError(
                f"{name} must have as many rows as {first}, {tables[first].shape[0]}, got {tuple(table.shape)}"
            )
        first = first or name
