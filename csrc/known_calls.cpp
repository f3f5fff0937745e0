#include "known_calls.h"

#include <cstdint>
#include <cstring>

namespace ltxk {

namespace {

constexpr int kAbsent = -1;
// Bytes of a vector access: only tensors that are no further apart can be taken for one.
constexpr std::intptr_t kNear = 16;
// More than a model has; then all are forgotten, so that ever new shapes take no memory without end.
constexpr std::size_t kMost = 4096;

bool is_true(PyObject* result) {
    if (!result) throw py::error_already_set();
    int truth = PyObject_IsTrue(result);
    Py_DECREF(result);
    if (truth < 0) throw py::error_already_set();
    return truth == 1;
}

bool is_plain(PyObject* value) {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    return type == torch().tensor.ptr() || type == torch().parameter.ptr();
}

// Arguments as what their program depends on.
struct Layout {
    std::string key;
    std::vector<DLTensor> tensors;
    std::vector<PyObject*> objects;

    // False where an argument is nothing that is known here, or a gradient is wanted.
    bool read(const py::tuple& arguments) {
        key.reserve(512);
        differentiated_ = is_true(PyObject_CallNoArgs(torch().is_grad_enabled.ptr()));
        for (py::handle argument : arguments)
            if (!add(argument.ptr())) return false;
        for (std::size_t i = 0; i < tensors.size(); ++i)
            for (std::size_t j = i + 1; j < tensors.size(); ++j) {
                auto first = reinterpret_cast<std::intptr_t>(address_of(tensors[i]));
                std::intptr_t apart = reinterpret_cast<std::intptr_t>(address_of(tensors[j])) - first;
                if (apart < -kNear || apart > kNear) continue;
                put('~');
                put(i), put(j), put(apart);
            }
        return true;
    }

private:
    template <class T>
    void put(const T& value) {
        key.append(reinterpret_cast<const char*>(&value), sizeof value);
    }

    bool add(PyObject* value) {
        if (value == Py_None) return put('-'), true;
        if (is_plain(value)) return add_tensor(value);
        if (PyFloat_CheckExact(value)) return put('f'), put(PyFloat_AS_DOUBLE(value)), true;
        if (PyBool_Check(value)) return put(value == Py_True ? 'T' : 'F'), true;
        if (PyLong_CheckExact(value)) {
            int overflow = 0;
            long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
            return put('i'), put(number), overflow == 0;
        }
        if (PyUnicode_CheckExact(value)) {
            Py_ssize_t size = 0;
            const char* text = PyUnicode_AsUTF8AndSize(value, &size);
            if (!text) return PyErr_Clear(), false;
            put('s'), put(size);
            key.append(text, static_cast<std::size_t>(size));
            return true;
        }
        return false;
    }

    bool add_tensor(PyObject* value) {
        // Of a negative view the memory has other values.
        if (is_true(PyObject_CallOneArg(torch().is_neg.ptr(), value))) return false;
        if (differentiated_ && is_true(PyObject_GetAttrString(value, "requires_grad"))) return false;
        std::optional<DLTensor> tensor = described(value);
        if (!tensor || !tensor->data) return false;
        put('t'), put(tensor->dtype), put(tensor->device), put(tensor->ndim);
        std::size_t bytes = static_cast<std::size_t>(tensor->ndim) * sizeof(std::int64_t);
        key.append(reinterpret_cast<const char*>(tensor->shape), bytes);
        if (tensor->strides) key.append(reinterpret_cast<const char*>(tensor->strides), bytes);
        put(static_cast<char>(reinterpret_cast<std::uintptr_t>(address_of(*tensor)) % kNear));
        tensors.push_back(*tensor);
        objects.push_back(value);
        return true;
    }

    bool differentiated_ = false;
};

bool is_contiguous(const DLTensor& tensor) {
    std::int64_t extent = 1;
    for (int dim = tensor.ndim - 1; dim >= 0; --dim) {
        if (tensor.strides && tensor.shape[dim] != 1 && tensor.strides[dim] != extent) return false;
        extent *= tensor.shape[dim];
    }
    return extent != 0;
}

bool is_like(const DLTensor& one, const DLTensor& other) {
    return one.ndim == other.ndim && std::memcmp(&one.dtype, &other.dtype, sizeof one.dtype) == 0 &&
           one.device.device_type == other.device.device_type && one.device.device_id == other.device.device_id &&
           std::memcmp(one.shape, other.shape, static_cast<std::size_t>(one.ndim) * sizeof(std::int64_t)) == 0;
}

// Which of the tensors has the address, or kAbsent.
int found_at(const void* address, const std::vector<DLTensor>& tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i)
        if (address_of(tensors[i]) == address) return static_cast<int>(i);
    return kAbsent;
}

template <class T>
bool all_below(const DLTensor& tensor, std::int64_t end) {
    const T* first = static_cast<const T*>(address_of(tensor));
    std::int64_t places[3] = {1, 1, 1}, steps[3] = {};
    for (int dim = 0; dim < tensor.ndim; ++dim) {
        int at = 3 - tensor.ndim + dim;
        places[at] = tensor.shape[dim];
        steps[at] = tensor.strides[dim];
    }
    bool below = true;
    for (std::int64_t i = 0; i < places[0]; ++i)
        for (std::int64_t j = 0; j < places[1]; ++j)
            for (std::int64_t k = 0; k < places[2]; ++k) {
                std::int64_t index = first[i * steps[0] + j * steps[1] + k * steps[2]];
                below &= index >= 0 && index < end;
            }
    return below;
}

// Whether indices on the CPU are rows of their table; those of a device nobody waits for. No indices are.
bool are_rows(PyObject* indices, PyObject* table) {
    if (indices == Py_None) return true;
    std::optional<DLTensor> given = described(indices), of = described(table);
    if (!given || !of || of->ndim == 0) return false;
    if (given->device.device_type != kDLCPU) return true;
    if (given->ndim > 3 || !given->strides || given->dtype.code != kDLInt) return false;
    if (given->dtype.bits == 32) return all_below<std::int32_t>(*given, of->shape[0]);
    return given->dtype.bits == 64 && all_below<std::int64_t>(*given, of->shape[0]);
}

py::object fresh_like(PyObject* model) {
    PyObject* given[] = {model, torch().contiguous_format.ptr()};
    PyObject* made = PyObject_Vectorcall(torch().empty_like.ptr(), given, 1, torch().memory_format.ptr());
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

}  // namespace

// Whether torch need not see a call: nothing traces, transforms or looks on.
bool KnownCalls::unfollowed() const {
    if (!torch().exchange || !torch().tensor) return false;
    for (py::handle function : followed_)
        if (is_true(PyObject_CallNoArgs(function.ptr()))) return false;
    return torch().forward_ad.attr("_current_level").cast<int>() < 0;
}

bool KnownCalls::note(const py::tuple& arguments, const py::object& program, const py::tuple& tensors, const py::object& outputs) {
    Layout layout;
    if (!unfollowed() || !layout.read(arguments) || layout.tensors.empty()) return false;
    auto call = std::make_shared<Call>();
    call->program = program;
    if (py::isinstance<CpuProgram>(program)) call->on_cpu = program.cast<CpuProgram*>();
    if (py::isinstance<DeviceProgram>(program)) call->on_device = program.cast<DeviceProgram*>();
    if (!call->on_cpu && !call->on_device) return false;
    call->single = is_plain(outputs.ptr());
    if (!call->single && !PyTuple_Check(outputs.ptr())) return false;
    std::vector<DLTensor> made;
    for (py::handle output : call->single ? py::make_tuple(outputs) : py::tuple(outputs)) {
        std::optional<DLTensor> tensor = is_plain(output.ptr()) ? described(output.ptr()) : std::nullopt;
        if (!tensor || !is_contiguous(*tensor)) return false;
        std::size_t model = 0;
        while (model < layout.tensors.size() && !is_like(layout.tensors[model], *tensor)) ++model;
        if (model == layout.tensors.size()) return false;
        call->models.push_back(model);
        made.push_back(*tensor);
    }
    for (py::handle one : tensors) {
        int source = kAbsent;
        if (!one.is_none()) {
            std::optional<DLTensor> tensor = is_plain(one.ptr()) ? described(one.ptr()) : std::nullopt;
            if (!tensor) return false;
            int output = found_at(address_of(*tensor), made);
            int argument = found_at(address_of(*tensor), layout.tensors);
            source = output == kAbsent ? argument : static_cast<int>(layout.tensors.size()) + output;
            if (source == kAbsent) return false;
        }
        call->sources.push_back(source);
    }
    if (calls_.size() >= kMost) calls_.clear();
    calls_[layout.key] = std::move(call);
    return true;
}

py::object KnownCalls::again(const py::tuple& arguments) const {
    Layout layout;
    if (calls_.empty() || !unfollowed() || !layout.read(arguments)) return py::none();
    auto found = calls_.find(layout.key);
    if (found == calls_.end()) return py::none();
    // Kept: whoever runs while the GIL is released may forget all calls.
    const std::shared_ptr<const Call> call = found->second;
    for (auto [indices, table] : indices_)
        if (!are_rows(arguments[indices].ptr(), arguments[table].ptr())) return py::none();
    std::vector<const void*> given;
    for (const DLTensor& tensor : layout.tensors) given.push_back(address_of(tensor));
    py::tuple outputs(call->models.size());
    for (std::size_t i = 0; i < call->models.size(); ++i) {
        py::object output = fresh_like(layout.objects[call->models[i]]);
        std::optional<DLTensor> tensor = is_plain(output.ptr()) ? described(output.ptr()) : std::nullopt;
        // Programs count on memory as torch gives it.
        if (!tensor || reinterpret_cast<std::uintptr_t>(address_of(*tensor)) % kNear != 0) return py::none();
        given.push_back(address_of(*tensor));
        outputs[i] = std::move(output);
    }
    std::vector<const void*> addresses;
    for (int source : call->sources) addresses.push_back(source == kAbsent ? nullptr : given[static_cast<std::size_t>(source)]);
    if (call->on_cpu)
        run(*call->on_cpu, addresses.data());
    else
        run(*call->on_device, addresses.data(), layout.tensors.front().device);
    return call->single ? py::object(outputs[0]) : py::object(outputs);
}

}  // namespace ltxk
