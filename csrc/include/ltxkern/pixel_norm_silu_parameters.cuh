// Parameters of pixel_norm_silu, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

struct PixelNormSilu {
    const void* x;
    void* out;
    const void* weight;
    i64 weight_type;
    i64 samples, channels, positions, channels_last;
    i64 out_sample, out_channel;  // contiguous: from a sample, and from a channel, of out to the next
    double eps;
};
