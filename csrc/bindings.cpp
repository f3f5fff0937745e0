// The extension module: programs, called with torch tensors (DLPack C exchange API) or with raw addresses.
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "known_calls.h"
#include "torch_calls.h"

#ifndef LTXK_MODULE
#define LTXK_MODULE _C
#endif

namespace py = pybind11;

namespace {

struct Arguments {
    std::vector<const void*> addresses;
    DLDevice device{kDLCPU, 0};
};

// Addresses of torch tensors (None: absent); all on one device of the wanted kind.
Arguments resolve(const py::args& tensors, std::size_t count, bool on_device) {
    const DLPackExchangeAPI* exchange = ltxk::torch().exchange;
    if (!exchange) throw std::runtime_error("torch.Tensor has no DLPack exchange API here: call raw()");
    if (tensors.size() != count)
        throw py::type_error("program takes " + std::to_string(count) + " tensors, got " + std::to_string(tensors.size()));
    Arguments arguments;
    arguments.addresses.reserve(count);
    bool first = true;
    for (const py::handle& object : tensors) {
        if (object.is_none()) {
            arguments.addresses.push_back(nullptr);
            continue;
        }
        DLTensor tensor;
        if (exchange->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) throw py::error_already_set();
        if (ltxk::is_freed(tensor))
            throw py::value_error("a tensor has elements and no memory: its storage was freed, or it stands for another");
        bool cuda = tensor.device.device_type == kDLCUDA;
        if (cuda != on_device || (!cuda && tensor.device.device_type != kDLCPU))
            throw py::value_error(on_device ? "program is for CUDA tensors" : "program is for CPU tensors");
        if (first) arguments.device = tensor.device;
        if (tensor.device.device_id != arguments.device.device_id) throw py::value_error("tensors lie on different devices");
        first = false;
        arguments.addresses.push_back(ltxk::address_of(tensor));
    }
    return arguments;
}

std::vector<const void*> as_addresses(const std::vector<std::uint64_t>& raw, std::size_t count) {
    if (raw.size() != count)
        throw py::type_error("program takes " + std::to_string(count) + " addresses, got " + std::to_string(raw.size()));
    std::vector<const void*> addresses;
    for (std::uint64_t address : raw) addresses.push_back(reinterpret_cast<const void*>(address));
    return addresses;
}

void unpack(ltxk::Step& step, const py::bytes& parameters,
            const std::vector<std::tuple<std::uint32_t, std::uint32_t, std::int64_t>>& relocations) {
    std::string packed = parameters;
    step.parameters.resize(packed.size() / 8);
    std::memcpy(step.parameters.data(), packed.data(), step.parameters.size() * 8);
    for (auto [slot, argument, offset] : relocations) step.relocations.push_back({slot, argument, offset});
}

using Relocations = std::vector<std::tuple<std::uint32_t, std::uint32_t, std::int64_t>>;

using ltxk::CpuProgram;
using ltxk::DeviceProgram;

const ltxk::KernelEntry& kernel_named(const std::string& kernel) {
    auto found = ltxk::kernel_table().find(kernel);
    if (found == ltxk::kernel_table().end()) throw py::key_error("no kernel " + kernel + " in this build");
    return found->second;
}

void add_launch(DeviceProgram& program, const std::string& kernel, std::tuple<unsigned, unsigned, unsigned> grid, unsigned block,
                unsigned shared_bytes, bool cooperative, const py::bytes& parameters, const Relocations& relocations) {
    ltxk::Step step;
    step.kernel = &kernel_named(kernel);
    step.shape = {{std::get<0>(grid), std::get<1>(grid), std::get<2>(grid)}, block, shared_bytes, cooperative};
    unpack(step, parameters, relocations);
    program.add(std::move(step));
}

void add_zero(DeviceProgram& program, std::uint32_t argument, std::int64_t offset, std::size_t bytes) {
    ltxk::Step step;
    step.zero_bytes = bytes;
    step.relocations.push_back({0, argument, offset});
    program.add(std::move(step));
}

void add_call(CpuProgram& program, const std::string& kernel, const py::bytes& parameters, const Relocations& relocations) {
    auto found = ltxk::cpu_table().find(kernel);
    if (found == ltxk::cpu_table().end()) throw py::key_error("no CPU kernel " + kernel + " in this build");
    auto function = found->second.find(ltxk::best_isa());
    if (function == found->second.end())
        throw py::key_error("CPU kernel " + kernel + " is not built for " + ltxk::isa_name(ltxk::best_isa()));
    ltxk::Step step;
    step.function = function->second;
    unpack(step, parameters, relocations);
    program.add(std::move(step));
}

void call_device(DeviceProgram& program, const py::args& tensors) {
#if defined(LTXK_SHIM)
    Arguments arguments = resolve(tensors, program.argument_count(), false);
#else
    Arguments arguments = resolve(tensors, program.argument_count(), true);
#endif
    ltxk::run(program, arguments.addresses.data(), arguments.device);
}

std::size_t held(const std::string& kernel, unsigned block, unsigned shared_bytes, bool cooperative, int device) {
    const ltxk::KernelEntry& entry = kernel_named(kernel);
    py::gil_scoped_release release;
    ltxk::runtime::Current current(device);
    return ltxk::runtime::held(entry, {{1, 1, 1}, block, shared_bytes, cooperative});
}

std::optional<std::string> reason(const std::string& text) { return text.empty() ? std::nullopt : std::optional(text); }

void call_cpu(const CpuProgram& program, const py::args& tensors) {
    ltxk::run(program, resolve(tensors, program.argument_count(), false).addresses.data());
}

void use_torch(const py::object& tensor, const py::object& parameter, const py::object& is_grad_enabled, const py::object& is_neg,
               const py::object& empty_like, const py::object& contiguous_format, const py::object& threads,
               const py::object& forward_ad) {
    ltxk::Torch& torch = ltxk::torch();
    py::tuple names = py::make_tuple("memory_format");
    torch = {torch.exchange, tensor, parameter, is_grad_enabled, is_neg, empty_like, names, contiguous_format, threads, forward_ad};
}

}  // namespace

#if defined(LTXK_SHIM)
void bind_shim(py::module_& module);
#else
namespace ltxk {
// Of the sources that the build saw; CMakeLists.txt defines it.
extern const char* const source_digest;
}
#endif

PYBIND11_MODULE(LTXK_MODULE, module) {
    module.doc() = "Kernels of ltxkern: see ltxkern.compiled.extension, which is the only caller.";
    module.def("use_exchange_api", &ltxk::use_exchange_api);
    module.def("use_torch", &use_torch, "What calls need of torch beside its exchange API.");
    module.def("cuda_unavailable", [] { return reason(ltxk::runtime::unavailable()); }, py::call_guard<py::gil_scoped_release>(),
               "Why no CUDA kernel can run in this process as it is now, or None.");
    module.def("cuda_unserved", [](int device) { return reason(ltxk::runtime::unserved(device)); },
               py::call_guard<py::gil_scoped_release>(), "Why this build has no code for a device, or None.");
    module.def("held", &held, "Blocks of a launch that a device holds at once; 0 where it cannot run it.");
    module.def("isa", [] { return std::string(ltxk::isa_name(ltxk::best_isa())); }, "Instruction set of the CPU kernels.");
    module.def("kernels", [] {
        std::vector<std::string> names;
        for (const auto& [name, entry] : ltxk::kernel_table()) names.push_back(name);
        return names;
    });
    module.def("cpu_kernels", [] {
        std::vector<std::string> names;
        for (const auto& [name, entries] : ltxk::cpu_table())
            if (entries.count(ltxk::best_isa())) names.push_back(name);
        return names;
    });
    // The CPU shim has the same classes, and may be in the same process.
    py::class_<DeviceProgram>(module, "DeviceProgram", py::module_local())
        .def(py::init<std::size_t>())
        .def("add_launch", &add_launch)
        .def("add_zero", &add_zero)
        .def("__call__", &call_device, "Run on torch tensors, on the current stream of their device.")
        .def("raw",
             [](DeviceProgram& program, const std::vector<std::uint64_t>& raw, int device, std::uint64_t stream) {
                 auto addresses = as_addresses(raw, program.argument_count());
                 py::gil_scoped_release release;
                 program.run_device(addresses.data(), device, reinterpret_cast<void*>(stream));
             },
             "Run on raw device addresses (0: absent) and a raw stream.");
    py::class_<CpuProgram>(module, "CpuProgram", py::module_local())
        .def(py::init<std::size_t>())
        .def("add_call", &add_call)
        .def("__call__", &call_cpu, "Run on torch CPU tensors with torch's number of threads.")
        .def("raw", [](const CpuProgram& program, int threads, const std::vector<std::uint64_t>& raw) {
            auto addresses = as_addresses(raw, program.argument_count());
            py::gil_scoped_release release;
            program.run_cpu(addresses.data(), threads);
        });
    py::class_<ltxk::KnownCalls>(module, "KnownCalls", py::module_local())
        .def(py::init<std::vector<std::pair<std::size_t, std::size_t>>, py::tuple>(), py::arg("indices"),
             py::arg("followed"))
        .def("again", &ltxk::KnownCalls::again, py::arg("arguments"), "The outputs of a call like one that was noted, else None.")
        .def("note", &ltxk::KnownCalls::note, py::arg("arguments"), py::arg("program"), py::arg("tensors"), py::arg("outputs"),
             "Remember the program that served a call; whether it can serve the next one.")
        .def("__len__", &ltxk::KnownCalls::size);
#if defined(LTXK_SHIM)
    bind_shim(module);
#else
    module.attr("source_digest") = ltxk::source_digest;
#endif
}
