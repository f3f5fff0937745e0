// The part of the CUDA runtime that csrc/runtime_cuda.cu calls, with the device's rules for shared memory and no device.
#pragma once

#include <cstddef>
#include <map>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
    int maxDynamicSharedSizeBytes;
};
struct cudaLaunchAttribute {
    int id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

// A kernel here is an object of this type; 227 KiB is what a block can have on compute capability 9.0.
struct FakeKernel {
    int static_bytes;
    int dynamic_bytes = 48 * 1024 - static_bytes;
};
inline FakeKernel* fake(const void* function) { return static_cast<FakeKernel*>(const_cast<void*>(function)); }

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
    *out = {static_cast<std::size_t>(fake(function)->static_bytes), fake(function)->dynamic_bytes};
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value + fake(function)->static_bytes > 227 * 1024) return cudaErrorInvalidValue;
    fake(function)->dynamic_bytes = value;
    return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    return static_cast<int>(config->dynamicSmemBytes) > fake(function)->dynamic_bytes ? cudaErrorInvalidValue : cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void*, int, std::size_t, cudaStream_t) { return cudaSuccess; }
