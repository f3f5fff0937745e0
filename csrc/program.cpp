// Running of programs, and the choice of the CPU instruction set.
#include "program.h"

#include <cstdlib>
#include <stdexcept>

namespace ltxk {

void Program::add(Step step) {
    for (const Relocation& relocation : step.relocations) {
        if (relocation.argument >= argument_count_) throw std::invalid_argument("relocation names an argument the program has not");
        if (step.zero_bytes == 0 && relocation.slot >= step.parameters.size())
            throw std::invalid_argument("relocation names a slot outside the parameters");
    }
    if (step.kernel && step.kernel->parameter_bytes != step.parameters.size() * 8)
        throw std::invalid_argument("kernel takes " + std::to_string(step.kernel->parameter_bytes) + " bytes of parameters, got " +
                                    std::to_string(step.parameters.size() * 8));
    steps_.push_back(std::move(step));
}

void Program::fill(const Step& step, const void* const* addresses, std::vector<std::uint64_t>& parameters) const {
    parameters.assign(step.parameters.begin(), step.parameters.end());
    for (const Relocation& relocation : step.relocations) {
        auto base = reinterpret_cast<std::uintptr_t>(addresses[relocation.argument]);
        parameters[relocation.slot] = base ? base + static_cast<std::uint64_t>(relocation.offset) : 0;
    }
}

void Program::prepare(int device) {
    // Devices beyond the 64th are prepared at every call, which is right and slow.
    const std::uint64_t bit = static_cast<unsigned>(device) < 64 ? std::uint64_t{1} << device : 0;
    if (prepared_.load(std::memory_order_acquire) & bit) return;
    std::lock_guard<std::mutex> lock(preparing_);
    for (const Step& step : steps_)
        if (step.kernel) runtime::prepare(*step.kernel, step.shape);
    prepared_.fetch_or(bit, std::memory_order_release);
}

void Program::run_device(const void* const* addresses, int device, void* stream) {
    runtime::Current current(device);
    prepare(device);
    std::vector<std::uint64_t> parameters;
    for (const Step& step : steps_) {
        if (!step.kernel) {
            const Relocation& target = step.relocations.at(0);
            auto* base = static_cast<unsigned char*>(const_cast<void*>(addresses[target.argument]));
            runtime::zero(base + target.offset, step.zero_bytes, stream);
            continue;
        }
        fill(step, addresses, parameters);
        runtime::launch(*step.kernel, step.shape, parameters.data(), stream);
    }
}

void Program::run_cpu(const void* const* addresses, int threads) const {
    std::vector<std::uint64_t> parameters;
    for (const Step& step : steps_) {
        fill(step, addresses, parameters);
        step.function(parameters.data(), threads);
    }
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kAvx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case Isa::kBase:
            return __builtin_cpu_supports("sse4.2");
    }
#endif
    return isa == Isa::kBase;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx2:
            return "avx2";
        default:
            return "base";
    }
}

static Isa choose_isa() {
    const char* forced = std::getenv("LTXKERN_CPU_ISA");
    if (forced && *forced) {
        for (Isa isa : {Isa::kBase, Isa::kAvx2, Isa::kAvx512})
            if (std::string(forced) == isa_name(isa)) {
                if (!isa_supported(isa)) throw std::runtime_error(std::string("LTXKERN_CPU_ISA: this processor has no ") + forced);
                return isa;
            }
        throw std::runtime_error(std::string("LTXKERN_CPU_ISA must be base, avx2 or avx512, got ") + forced);
    }
    for (Isa isa : {Isa::kAvx512, Isa::kAvx2})
        if (isa_supported(isa)) return isa;
    return Isa::kBase;
}

Isa best_isa() {
    static const Isa isa = choose_isa();
    return isa;
}

}  // namespace ltxk
