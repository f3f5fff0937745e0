// What a program needs from a device: implemented by the CUDA runtime, by the CPU shim of the tests, or absent.
#pragma once

#include <cstddef>

#include "registry.h"

namespace ltxk {

struct LaunchShape {
    unsigned grid[3];
    unsigned block;
    unsigned shared_bytes;
    unsigned cluster;  // blocks per cluster along x; 1 for none
    bool cooperative;  // all blocks resident at once
};

namespace runtime {

// Why no kernel can be launched in this process, or nullptr.
const char* unavailable();
// Makes `device` current and returns the device that was; restore() undoes it.
int enter(int device);
void restore(int device);
void zero(void* address, std::size_t bytes, void* stream);
void launch(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters, void* stream);
// Once per kernel, device and size: allows more dynamic shared memory than the default.
void prepare(const KernelEntry& kernel, const LaunchShape& shape);

}  // namespace runtime
}  // namespace ltxk
