// What a program needs from a device: implemented by the CUDA runtime, by the CPU shim of the tests, or absent.
#pragma once

#include <cstddef>
#include <string>

#include "registry.h"

namespace ltxk {

struct LaunchShape {
    unsigned grid[3];
    unsigned block;
    unsigned shared_bytes;
    bool cooperative;  // all blocks resident at once
};

namespace runtime {

// Why no kernel can be launched in this process as it is now, or "".
std::string unavailable();
// Why this build has nothing to run on a device of the process, or "".
std::string unserved(int device);
// Makes `device` current and returns the device that was; restore() undoes it.
int enter(int device);
void restore(int device);
void zero(void* address, std::size_t bytes, void* stream);
void launch(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters, void* stream);
// Once per kernel, device and size: loads the kernel and allows more dynamic shared memory than the default. Legal during a capture.
void prepare(const KernelEntry& kernel, const LaunchShape& shape);
// Blocks of a launch that the current device holds at once; 0 where it cannot run the launch.
std::size_t held(const KernelEntry& kernel, const LaunchShape& shape);

// A device is current for as long as this lives.
class Current {
public:
    explicit Current(int device) : previous_(enter(device)) {}
    ~Current() { restore(previous_); }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    int previous_;
};

}  // namespace runtime
}  // namespace ltxk
