// The runtime of the shim module: programs launch on fibers instead of a device.
#include <pybind11/pybind11.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "ltxkern/types.cuh"
#include "runtime.h"

namespace ltxk::shim {
void run_grid(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters);
void set_schedule(unsigned seed, bool shuffle);
void set_only(std::size_t first, std::size_t count);
}  // namespace ltxk::shim

namespace ltxk::runtime {

// One launch at a time: the fibers of two would be in each other's way.
static std::mutex gate;
static std::condition_variable opened;
static bool shut = false, awaited = false;

std::string unavailable() { return ""; }
std::string unserved(int) { return ""; }
// As many as anyone asks for.
std::size_t held(const KernelEntry&, const LaunchShape&) { return ~0u; }
int enter(int device) { return device; }
void restore(int) {}
void zero(void* address, std::size_t bytes, void*) { std::memset(address, 0, bytes); }
void prepare(const KernelEntry&, const LaunchShape& shape) {
    if (shape.shared_bytes > 227u * 1024u) throw std::runtime_error("more dynamic shared memory than any device has");
}
void launch(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters, void*) {
    std::unique_lock<std::mutex> lock(gate);
    awaited = shut;
    if (!opened.wait_for(lock, std::chrono::seconds(20), [] { return !shut; })) throw std::runtime_error("the gate stayed shut");
    shim::run_grid(kernel, shape, parameters);
}

static void set_gate(bool now) {
    std::lock_guard<std::mutex> lock(gate);
    shut = now;
    awaited = false;
    opened.notify_all();
}

static bool is_awaited() {
    std::lock_guard<std::mutex> lock(gate);
    return awaited;
}

}  // namespace ltxk::runtime

void bind_shim(pybind11::module_& module) {
    module.def("schedule", &ltxk::shim::set_schedule, pybind11::arg("seed"), pybind11::arg("shuffle") = true,
               "Seed of the fiber order; shuffle=False runs fibers in thread order.");
    module.def("shut_gate", &ltxk::runtime::set_gate, pybind11::arg("shut"), "While it is shut launches wait, as on a busy device.");
    module.def("divide", &ltxk::divide, "As kernels divide, by what launches make of the divisor.");
    module.def("gate_is_awaited", &ltxk::runtime::is_awaited, "Whether a launch waits.");
    module.def("only_blocks", &ltxk::shim::set_only, pybind11::arg("first"), pybind11::arg("count"),
               "Later launches run these blocks of their grid alone; count 0 runs all.");
}
