// Calls of an op that were served before, by how their arguments lie: the next one like them runs its program at once.
//
// What Python works out of a call (is it legal, who serves it, by which launches) depends on types, shapes, strides, devices,
// alignment and neighbourhood of its tensors and on its numbers, and on no value of a tensor. A call with the same of all these has
// the same program, whose tensors are arguments and fresh outputs. Python asks before (`Op.again`) whether a compiler traces, which
// must see none of this, and whether a backend is named.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch_calls.h"

namespace ltxk {

class KnownCalls {
public:
    // `indices`: pairs of an argument that holds indices, and the one whose rows they are. `followed`: functions that return
    // something true where torch has to see a call.
    KnownCalls(std::vector<std::pair<std::size_t, std::size_t>> indices, py::tuple followed)
        : indices_(std::move(indices)), followed_(std::move(followed)) {}

    // The outputs of a call like one that was noted; None where there was none, where torch has to see the call or a gradient is
    // wanted, and where an index on the CPU is no row of its table, which Python says in words.
    py::object again(const py::tuple& arguments) const;

    // Remember that `program` served a call with these tensors, and whether it can serve the next one: where each tensor is an
    // argument or an output, and the outputs are contiguous and like an argument.
    bool note(const py::tuple& arguments, const py::object& program, const py::tuple& tensors, const py::object& outputs);

    std::size_t size() const { return calls_.size(); }

private:
    struct Call {
        py::object program;
        CpuProgram* on_cpu = nullptr;
        DeviceProgram* on_device = nullptr;
        // For each of the program's tensors: of the arguments', then of the outputs; kAbsent.
        std::vector<int> sources;
        // For each output the argument that it is like.
        std::vector<std::size_t> models;
        bool single = true;
    };
    bool unfollowed() const;

    std::vector<std::pair<std::size_t, std::size_t>> indices_;
    py::tuple followed_;
    std::unordered_map<std::string, std::shared_ptr<const Call>> calls_;
};

}  // namespace ltxk
