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

static std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::string unavailable() {
    int count = 0, driver = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
        if (driver == 0) return "no CUDA device: there is no NVIDIA driver";
        // A runtime works with every driver of its own major version, and newer ones.
        constexpr int kMajor = CUDART_VERSION / 1000;
        std::string least = kMajor == 12 ? " to 525 or newer" : kMajor == 13 ? " to 580 or newer" : "";
        return "the NVIDIA driver supports CUDA " + dotted(driver) + ", this build needs " + dotted(CUDART_VERSION) +
               ": update the driver" + least + (kMajor > 12 ? ", or install the wheel for CUDA 12.8, whose version ends in +cu128" : "");
    }
    if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
    return count == 0 ? "no CUDA device" : "";
}

// A kernel that is loaded at its first use is so outside the rules that a capture of any thread lays on all of them.
class Relaxed {
public:
    Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    Relaxed(const Relaxed&) = delete;
    Relaxed& operator=(const Relaxed&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

std::string unserved(int device) {
    Current current(device);
    Relaxed relaxed;
    cudaFuncAttributes attributes;
    cudaError_t status = cudaFuncGetAttributes(&attributes, kernel_table().begin()->second.function);
    cudaGetLastError();
    if (status == cudaSuccess) return "";
    if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction)
        return std::string("the kernels of this build do not load: ") + cudaGetErrorString(status);
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    std::string capability = std::to_string(major) + "." + std::to_string(minor);
    return "this build has no code for compute capability " + capability + ": rebuild it with TORCH_CUDA_ARCH_LIST=" + capability;
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
    Relaxed relaxed;
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

static int attribute(cudaDeviceAttr wanted) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, wanted, device), "cudaDeviceGetAttribute");
    return value;
}

std::size_t held(const KernelEntry& kernel, const LaunchShape& shape) {
    Relaxed relaxed;
    cudaFuncAttributes fixed;
    check(cudaFuncGetAttributes(&fixed, kernel.function), "cudaFuncGetAttributes");
    if (shape.shared_bytes + fixed.sharedSizeBytes > static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) ||
        shape.block > static_cast<unsigned>(fixed.maxThreadsPerBlock) ||
        (shape.cooperative && !attribute(cudaDevAttrCooperativeLaunch)))
        return 0;
    prepare(kernel, shape);
    int count = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel.function, shape.block, shape.shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return static_cast<std::size_t>(count) * attribute(cudaDevAttrMultiProcessorCount);
}

void launch(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters, void* stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.grid[0], shape.grid[1], shape.grid[2]);
    config.blockDim = dim3(shape.block);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute together;
    if (shape.cooperative) {
        together.id = cudaLaunchAttributeCooperative;
        together.val.cooperative = 1;
        config.attrs = &together;
        config.numAttrs = 1;
    }
    void* arguments[] = {const_cast<void*>(parameters)};
    check(cudaLaunchKernelExC(&config, kernel.function, arguments), "kernel launch");
}

}  // namespace ltxk::runtime
