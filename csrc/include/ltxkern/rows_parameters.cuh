// How operands that broadcast to the rows of x lie, on every device. Included within a namespace that has i64 and u64.
#pragma once

// An operand over the rows of x, which collapse to (outer, inner): strides in elements, 0 where it is broadcast.
struct RowOperand {
    const void* data;
    i64 type, outer_stride, inner_stride;

    LTXK_DEVICE i64 row(i64 outer, i64 inner) const { return outer * outer_stride + inner * inner_stride; }
};

// One index per row of x into tables of `count` rows, whose operands have that row as `inner`; data null: the operands are no tables.
struct RowIndex {
    const void* data;
    i64 bytes, count;  // of an index, 4 or 8, or 0 with data null; of the tables' rows
    i64 outer_stride, inner_stride;

    // Turns the place of a row of x into that of its row in the tables; false where they have no such row.
    LTXK_DEVICE bool find(i64& outer, i64& inner) const {
        if (!data) return true;
        i64 at = outer * outer_stride + inner * inner_stride;
        outer = 0;
        inner = bytes == 8 ? static_cast<const i64*>(data)[at] : static_cast<const int*>(data)[at];
        return static_cast<u64>(inner) < static_cast<u64>(count);
    }
};
