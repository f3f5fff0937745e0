// Tensors by DLPack's exchange API, and programs as torch would run them.
#include "torch_calls.h"

#include <stdexcept>

namespace ltxk {

Torch& torch() {
    static Torch* known = new Torch;
    return *known;
}

void use_exchange_api(const py::capsule& capsule) {
    auto* header = static_cast<DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!header) throw py::error_already_set();
    while (header && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
    if (!header) throw std::runtime_error("no DLPack exchange API of major version 1");
    torch().exchange = reinterpret_cast<const DLPackExchangeAPI*>(header);
}

std::optional<DLTensor> described(PyObject* tensor) {
    DLTensor found;
    if (torch().exchange->dltensor_from_py_object_no_sync(tensor, &found) == 0) return found;
    PyErr_Clear();
    return std::nullopt;
}

bool is_freed(const DLTensor& tensor) {
    if (tensor.data) return false;
    for (int dim = 0; dim < tensor.ndim; ++dim)
        if (tensor.shape[dim] == 0) return false;
    return true;
}

void run(DeviceProgram& program, const void* const* addresses, DLDevice device) {
    void* stream = nullptr;
#if !defined(LTXK_SHIM)
    if (torch().exchange->current_work_stream(device.device_type, device.device_id, &stream) != 0) throw py::error_already_set();
#endif
    py::gil_scoped_release release;
    program.run_device(addresses, device.device_id, stream);
}

void run(const CpuProgram& program, const void* const* addresses) {
    int threads = torch().threads().cast<int>();
    py::gil_scoped_release release;
    program.run_cpu(addresses, threads);
}

}  // namespace ltxk
