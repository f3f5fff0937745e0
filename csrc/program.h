// A program: the launches of one op call for one shape, made once by Python and run many times on fresh tensors.
//
// Python works out the geometry; a program only fills tensor addresses into the parameter structs and launches on the caller's
// current stream. The same launches serve the prebuilt tier, the NVRTC tier and the CPU shim of the tests.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "registry.h"
#include "runtime.h"

namespace ltxk {

// Field `slot` (8 bytes each) of the parameters is the address of call argument `argument`, plus `offset` bytes.
struct Relocation {
    std::uint32_t slot;
    std::uint32_t argument;
    std::int64_t offset;
};

struct Step {
    const KernelEntry* kernel = nullptr;  // device programs; null: zero `zero_bytes` of the first relocation
    CpuFunction function = nullptr;       // CPU programs
    LaunchShape shape{};
    std::size_t zero_bytes = 0;
    std::vector<std::uint64_t> parameters;
    std::vector<Relocation> relocations;
};

class Program {
public:
    explicit Program(std::size_t argument_count) : argument_count_(argument_count) {}

    std::size_t argument_count() const { return argument_count_; }
    void add(Step step);
    // Addresses are in call order, null for an absent tensor. `device` and `stream` are for device programs, `threads` for CPU programs.
    // Threads may run the same program at once.
    void run_device(const void* const* addresses, int device, void* stream);
    void run_cpu(const void* const* addresses, int threads) const;

private:
    void prepare(int device);
    void fill(const Step& step, const void* const* addresses, std::vector<std::uint64_t>& parameters) const;

    std::size_t argument_count_;
    std::vector<Step> steps_;
    std::mutex preparing_;
    std::atomic<std::uint64_t> prepared_{0};  // a bit per device
};

// Best instruction set of this processor that has objects in this build, or the one LTXKERN_CPU_ISA names.
Isa best_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

}  // namespace ltxk
