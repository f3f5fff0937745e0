// Programs of one kernel with several sizes of shared memory, through csrc/runtime_cuda.cu.
//
// Arguments: static bytes of the kernel, then pairs "prepare BYTES" or "launch BYTES". Prints "ok", or what failed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "runtime.h"
#include "cuda_runtime.h"

int main(int count, char** words) try {
    FakeKernel function{std::atoi(words[1])};
    ltxk::KernelEntry kernel{&function, nullptr, 0};
    for (int i = 2; i + 1 < count; i += 2) {
        ltxk::LaunchShape shape{{1, 1, 1}, 256, static_cast<unsigned>(std::atoi(words[i + 1])), 1, false};
        if (std::strcmp(words[i], "prepare") == 0) ltxk::runtime::prepare(kernel, shape);
        else ltxk::runtime::launch(kernel, shape, nullptr, nullptr);
    }
    std::puts("ok");
} catch (const std::exception& error) {
    std::puts(error.what());
}
