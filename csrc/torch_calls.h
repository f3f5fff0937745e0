// What the module knows of torch without its headers: tensors by DLPack's exchange API, and what Python hands over once.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "program.h"

namespace ltxk {

namespace py = pybind11;

struct Torch {
    const DLPackExchangeAPI* exchange = nullptr;
    py::object tensor, parameter;        // the types of plain tensors
    py::object is_grad_enabled, is_neg;  // torch.is_grad_enabled, Tensor.is_neg
    py::object empty_like, memory_format, contiguous_format;  // a function, the names of its keyword arguments, its value
    py::object threads;     // torch.get_num_threads
    py::object forward_ad;  // the module whose _current_level is below 0 outside of forward-mode gradients
};

// Never destroyed: the interpreter may be gone before the module.
Torch& torch();

// RuntimeError where it has no major version 1.
void use_exchange_api(const py::capsule& capsule);

// A tensor as it lies, shape and strides in its own memory; nothing where torch cannot say.
std::optional<DLTensor> described(PyObject* tensor);

// Whether it has elements and no memory, as where its storage was freed.
bool is_freed(const DLTensor& tensor);

inline const void* address_of(const DLTensor& tensor) { return static_cast<const char*>(tensor.data) + tensor.byte_offset; }

struct DeviceProgram : Program {
    using Program::Program;
};
struct CpuProgram : Program {
    using Program::Program;
};

// On the device's current stream, and with torch's number of threads; without the GIL.
void run(DeviceProgram& program, const void* const* addresses, DLDevice device);
void run(const CpuProgram& program, const void* const* addresses);

}  // namespace ltxk
