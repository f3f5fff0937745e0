// csrc/runtime_cuda.cu on a stand-in for the CUDA runtime.
//
// Arguments: static bytes of the one kernel, then pairs: "prepare BYTES", "launch BYTES", "held BYTES" (of a block), "cooperative BYTES"
// and "together BYTES" (held, and launched, where all blocks wait for one another), "unavailable -", "unserved -"; "plant:NAME NUMBER"
// plants what the device answers. Prints the answers, a line each, then "ok", or what failed.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "runtime.h"
#include "cuda_runtime.h"

int main(int count, char** words) try {
    FakeKernel function{std::atoi(words[1])};
    ltxk::kernel_table().emplace("kernel", ltxk::KernelEntry{&function, nullptr, 0});
    ltxk::KernelEntry kernel = ltxk::kernel_table().at("kernel");
    for (int i = 2; i + 1 < count; i += 2) {
        std::string word = words[i];
        unsigned number = static_cast<unsigned>(std::atoi(words[i + 1]));
        ltxk::LaunchShape shape{{1, 1, 1}, 256, number, word == "cooperative" || word == "together"};
        if (word == "prepare") ltxk::runtime::prepare(kernel, shape);
        else if (word == "launch" || word == "together") ltxk::runtime::launch(kernel, shape, nullptr, nullptr);
        else if (word == "held" || word == "cooperative") std::printf("%zu\n", ltxk::runtime::held(kernel, shape));
        else if (word == "unavailable") std::puts(ltxk::runtime::unavailable().c_str());
        else if (word == "unserved") std::puts(ltxk::runtime::unserved(0).c_str());
        else planted.at(word.substr(word.find(':') + 1)) = number;
    }
    std::puts("ok");
} catch (const std::exception& error) {
    std::puts(error.what());
}
