// The runtime of a build without CUDA: it says so.
#include <stdexcept>

#include "runtime.h"

namespace ltxk::runtime {

static const char* const kReason = "this ltxkern._C was built without CUDA: reinstall with nvcc on PATH (LTXKERN_BUILD=cuda)";

std::string unavailable() { return kReason; }
std::string unserved(int) { return kReason; }
int enter(int) { throw std::runtime_error(kReason); }
void restore(int) {}
void zero(void*, std::size_t, void*) { throw std::runtime_error(kReason); }
void prepare(const KernelEntry&, const LaunchShape&) { throw std::runtime_error(kReason); }
std::size_t held(const KernelEntry&, const LaunchShape&) { throw std::runtime_error(kReason); }
void launch(const KernelEntry&, const LaunchShape&, const void*, void*) { throw std::runtime_error(kReason); }

}  // namespace ltxk::runtime
