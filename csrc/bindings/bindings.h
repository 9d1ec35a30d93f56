// The module's table of contents: one register function per family, in a file of its own.
#pragma once
#include <pybind11/pybind11.h>

#include <type_traits>

namespace pse {

void register_topm(pybind11::module_& m);
void register_projection(pybind11::module_& m);
void register_sampling(pybind11::module_& m);
void register_limits(pybind11::module_& m);
void register_stream(pybind11::module_& m);
void register_files(pybind11::module_& m);

// Releases the GIL around a kernel. Not gil_scoped_release: a daemon thread that is inside one when the interpreter
// ends aborts the process.
template <class Kernel>
auto without_gil(Kernel&& kernel) {
    PyThreadState* state = PyEval_SaveThread();
    if constexpr (std::is_void_v<decltype(kernel())>) {
        kernel();
        PyEval_RestoreThread(state);
    } else {
        auto result = kernel();
        PyEval_RestoreThread(state);
        return result;
    }
}

// Addresses cross the border as integers (Tensor.data_ptr()): the core knows no torch.
template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace pse
