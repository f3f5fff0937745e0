// Parameters of the res2s kernels, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

constexpr int kModalities = 4;

// How one modality lies on the grid: its blocks begin at first_block. `slice`: elements that share statistics.
struct Extent {
    i64 size, slice, channels, first_block;
};

struct MidpointModality {
    const void* latent;
    const void* x0;
    const void* noise;
    const float* mask;
    const void* clean;
    const double* stats;
    void* middle;
    void* anchor;  // in the compute dtype
    i64 latent_type, x0_type, noise_type, clean_type;
    Extent extent;
};

struct Res2sMidpoint {
    MidpointModality modality[kModalities];
    i64 count;
    double c, a, b, s, gain;  // gain: 1 / (1 - c) where the anchor is refined, 0 where it is the state
};

struct AdvanceModality {
    const void* anchor;  // in the compute dtype
    const void* x0;
    const void* x0_mid;
    const void* noise;
    const float* mask;
    const void* clean;
    const double* stats;
    void* out;
    i64 x0_type, x0_mid_type, noise_type, clean_type, out_type;
    Extent extent;
};

struct Res2sAdvance {
    AdvanceModality modality[kModalities];
    i64 count;
    double hb1, hb2, a, b, s;
};

struct Res2sSdeStep {
    const void* sample;
    const void* denoised;
    const void* noise;
    const double* stats;
    void* out;
    i64 sample_type, denoised_type, noise_type;
    Extent extent;
    double a, b, s;
};
