// Parameters of qk_norm_rope, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

struct QkTensor {
    const void* x;
    const void* weight;
    void* out;
    i64 weight_type, batch_stride, token_stride;
};

struct QkNormRope {
    QkTensor tensor[2];
    const void* cos;
    const void* sin;
    i64 type, table_type;
    i64 table_batch, table_head, table_token, table_pair;  // strides of cos and sin
    i64 batch, tokens, heads, pairs;                       // pairs: half of a head
    i64 interleaved;
    double eps;
};
