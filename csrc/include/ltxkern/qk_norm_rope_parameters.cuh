// Parameters of qk_norm_rope, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

// Queries or keys, and their tables: cos and sin by batch, head, token and pair, or with `rows` by row and column.
struct QkTensor {
    const void* x;
    const void* weight;
    void* out;
    const void* cos;
    const void* sin;
    const void* rows;  // 32-bit numbers of table rows by batch, axis and token; null where a token has a row of its own
    i64 weight_type, batch_stride, token_stride, tokens;
    i64 table_batch, table_head, table_token, table_pair;   // strides of cos and sin; with `rows` table_token is between rows
    i64 rows_batch, rows_axis, rows_token, table_rows;      // strides of `rows`, and how many rows cos and sin have
};

struct QkNormRope {
    QkTensor tensor[2];
    i64 type, table_type;
    i64 batch, heads, pairs;  // pairs: half of a head
    i64 axes, lead;           // with `rows`: pair i of a token has column (i + lead) / axes of the row of axis (i + lead) % axes
    i64 interleaved;
    double eps;
};
