// The part of the CUDA runtime that csrc/runtime_cuda.cu calls, with the device's rules for shared memory and captures, and no device.
#pragma once

#include <cstddef>
#include <map>
#include <string>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorStreamCaptureUnsupported = 900
};
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum { cudaLaunchAttributeCooperative = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrCooperativeLaunch = 95,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

// What a test may plant: the driver's version, the devices, what one of them holds, the status of loading a kernel.
inline std::map<std::string, int> planted = {{"driver", 13000}, {"devices", 1}, {"blocks", 2}, {"load", 0},
                                             {"sees_cooperative", 1}, {"asks_cooperative", 0}};
inline cudaStreamCaptureMode fake_mode = cudaStreamCaptureModeGlobal;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
    int maxDynamicSharedSizeBytes;
    int maxThreadsPerBlock;
};
struct cudaLaunchAttribute {
    int id;
    struct {
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
    bool loaded = false;
};
inline FakeKernel* fake(const void* function) { return static_cast<FakeKernel*>(const_cast<void*>(function)); }

// Another thread captures all the time: a kernel is loaded in relaxed mode or not at all.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
    if (planted["load"]) return static_cast<cudaError_t>(planted["load"]);
    if (!fake(function)->loaded && fake_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
    fake(function)->loaded = true;
    *out = {static_cast<std::size_t>(fake(function)->static_bytes), fake(function)->dynamic_bytes, 512};
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value + fake(function)->static_bytes > 227 * 1024) return cudaErrorInvalidValue;
    fake(function)->dynamic_bytes = value;
    return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    bool together = config->numAttrs && config->attrs[0].id == cudaLaunchAttributeCooperative && config->attrs[0].val.cooperative;
    if (together != (planted["asks_cooperative"] != 0)) return cudaErrorInvalidValue;
    return static_cast<int>(config->dynamicSmemBytes) > fake(function)->dynamic_bytes ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* function, int, std::size_t bytes) {
    *count = static_cast<int>(bytes) > fake(function)->dynamic_bytes ? 0 : planted["blocks"];
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = std::map<int, int>{{16, 132}, {75, 11}, {76, 0}, {95, planted["sees_cooperative"]}, {97, 227 * 1024}}.at(attribute);
    return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    cudaStreamCaptureMode before = fake_mode;
    fake_mode = *mode;
    *mode = before;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
           : status == cudaErrorNoDevice               ? "no CUDA-capable device is detected"
                                                       : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
    if (planted["driver"] / 1000 < CUDART_VERSION / 1000) return cudaErrorInsufficientDriver;
    *count = planted["devices"];
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = planted["driver"], cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void*, int, std::size_t, cudaStream_t) { return cudaSuccess; }
