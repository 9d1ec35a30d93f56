#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

void pse::register_limits(py::module_& m) {
    m.def(
        "limit_read",
        [](uintptr_t data, int64_t bytes, int threads) {
            return without_gil([&] { return cpu().limits->read(pointer(data), bytes, threads); });
        },
        py::arg("data"), py::arg("bytes"), py::arg("threads"), "one pass of loads (csrc/cpu/limits.h)");
    m.def(
        "limit_axpy",
        [](uintptr_t params, uintptr_t base, uintptr_t tuned, int dtype, int64_t n, float scale, int threads) {
            without_gil([&] {
                cpu().limits->axpy(pointer(params), pointer(base), pointer(tuned), DType(dtype), n, scale, threads);
            });
        },
        py::arg("params"), py::arg("base"), py::arg("tuned"), py::arg("dtype"), py::arg("n"), py::arg("scale"),
        py::arg("threads"), "one dense params -= scale * (tuned - base) (csrc/cpu/limits.h)");
}
