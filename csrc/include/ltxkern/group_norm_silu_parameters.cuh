// Parameters of group_norm_silu, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

struct GroupNormSilu {
    const void* x;
    void* out;
    const void* residual;
    const void* weight;
    const void* bias;
    const void* conv_bias;
    i64 weight_type, bias_type, conv_bias_type;
    i64 samples, channels, group_channels, positions;  // positions: elements of a channel (D*H*W)
    i64 channels_last;
    double eps;
};
