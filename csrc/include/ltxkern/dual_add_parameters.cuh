// Parameters of dual_add, on every device. Included within a namespace that has i64, an integer of 8 bytes.
#pragma once

struct DualAdd {
    const void* x;
    const void* first;
    const void* second;
    void* out_first;
    void* out_second;
    i64 size;
};
