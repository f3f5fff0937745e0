// Launching on a CUDA device through the statically linked CUDA runtime.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace ltxk::runtime {

static void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

const char* unavailable() {
    static const std::string reason = [] {
        int count = 0;
        cudaError_t status = cudaGetDeviceCount(&count);
        cudaGetLastError();
        if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
        return std::string(count == 0 ? "no CUDA device" : "");
    }();
    return reason.empty() ? nullptr : reason.c_str();
}

int enter(int device) {
    int current = 0;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current != device) check(cudaSetDevice(device), "cudaSetDevice");
    return current;
}

void restore(int device) {
    int current = 0;
    if (cudaGetDevice(&current) == cudaSuccess && current != device) cudaSetDevice(device);
}

void zero(void* address, std::size_t bytes, void* stream) {
    check(cudaMemsetAsync(address, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

void prepare(const KernelEntry& kernel, const LaunchShape& shape) {
    cudaFuncAttributes now;
    check(cudaFuncGetAttributes(&now, kernel.function), "cudaFuncGetAttributes");
    // Static shared memory counts against the 48 KiB that need no request.
    if (shape.shared_bytes + now.sharedSizeBytes <= 48 * 1024) return;
    // Never lowered: an earlier program of the same kernel may need more than this one.
    int bytes = std::max(static_cast<int>(shape.shared_bytes), now.maxDynamicSharedSizeBytes);
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    // Such kernels keep their data in shared memory: as many blocks as it holds, whatever the L1 cache loses.
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "cudaFuncSetAttribute");
}

void launch(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters, void* stream) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.grid[0], shape.grid[1], shape.grid[2]);
    config.blockDim = dim3(shape.block);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (shape.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim = {shape.cluster, 1, 1};
        ++config.numAttrs;
    }
    if (shape.cooperative) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs].val.cooperative = 1;
        ++config.numAttrs;
    }
    void* arguments[] = {const_cast<void*>(parameters)};
    check(cudaLaunchKernelExC(&config, kernel.function, arguments), "kernel launch");
}

}  // namespace ltxk::runtime
