// Parameters of combine_guidance, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

struct CombineGuidance {
    const void* cond;
    const void* uncond;  // null branches are not read
    const void* perturbed;
    const void* isolated;
    void* out;
    i64 type, size;
    double cfg, stg, modality;  // factors of (cond - branch)
    double rescale;             // 0: none
};

// Mean and M2 of cond and of the combination over one chunk.
struct GuidancePartial {
    double cond_mean, cond_m2, mean, m2;
};
