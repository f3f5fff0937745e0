// Tables of the kernels in this build: each op's own file registers its instantiations, nothing else has to know them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace ltxk {

// A CUDA kernel: takes one struct of 8-byte fields by value.
struct KernelEntry {
    const void* function;                 // for cudaLaunchKernelExC; unused by the shim
    void (*call)(const void* parameters);  // runs one thread's share on the CPU; shim only
    std::size_t parameter_bytes;
};

// A CPU kernel of one instruction set: takes the same kind of struct, by address, and the number of threads.
using CpuFunction = void (*)(const void* parameters, int threads);

enum class Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

inline std::map<std::string, KernelEntry>& kernel_table() {
    static std::map<std::string, KernelEntry> table;
    return table;
}

inline std::map<std::string, std::map<Isa, CpuFunction>>& cpu_table() {
    static std::map<std::string, std::map<Isa, CpuFunction>> table;
    return table;
}

struct RegisterKernel {
    RegisterKernel(const char* name, KernelEntry entry) { kernel_table().emplace(name, entry); }
};

struct RegisterCpu {
    RegisterCpu(const char* name, Isa isa, CpuFunction function) { cpu_table()[name][isa] = function; }
};

template <class Parameters>
constexpr std::size_t parameter_bytes(void (*)(Parameters)) {
    static_assert(sizeof(Parameters) % 8 == 0, "parameters are 8-byte fields");
    return sizeof(Parameters);
}

template <auto Function>
struct Caller;
template <class Parameters, void (*Function)(Parameters)>
struct Caller<Function> {
    static void call(const void* parameters) { Function(*static_cast<const Parameters*>(parameters)); }
};

}  // namespace ltxk

#define LTXK_JOIN_(a, b) a##b
#define LTXK_JOIN(a, b) LTXK_JOIN_(a, b)

// LTXK_KERNEL(ltxk::some_kernel<ltxk::bf16>): registered under exactly these characters, which are also its NVRTC name expression.
#if defined(LTXK_SHIM)
#define LTXK_KERNEL(...) \
    static const ltxk::RegisterKernel LTXK_JOIN(register_, __COUNTER__)( \
        #__VA_ARGS__, {nullptr, &ltxk::Caller<&__VA_ARGS__>::call, ltxk::parameter_bytes(&__VA_ARGS__)});
#else
#define LTXK_KERNEL(...) \
    static const ltxk::RegisterKernel LTXK_JOIN(register_, __COUNTER__)( \
        #__VA_ARGS__, {reinterpret_cast<const void*>(&__VA_ARGS__), nullptr, ltxk::parameter_bytes(&__VA_ARGS__)});
#endif
