// prosocial_ptx: the entry points of prosocial_ext._C.cuda on host memory, every kernel run from nvcc's PTX.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda.h"
#include "machine.h"
#include "runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(prosocial_ptx, m) {
    m.doc() = "CUDA kernels of prosocial_ext as PTX on the CPU (tests/simt/ptx/machine.h).";
    m.def(
        "set_schedule",
        [](uint64_t seed) {
            pse::ptx::seed = seed;
            pse::ptx::launches = 0;  // the same launches then run in the same way
        },
        py::arg("seed"), "how the next launches run");
    m.attr("capabilities") = std::vector<int>(std::begin(pse::ptx::kCapabilities), std::end(pse::ptx::kCapabilities));
    m.def("current_device", [] { return pse::ptx::current_device; });
    m.def("counts", [] { return py::dict(py::arg("launches") = pse::ptx::launches); });
    m.def(
        "run",
        [](const std::string& text, int64_t blocks, int threads, const std::vector<uint64_t>& arguments, int size,
           uint64_t seed, bool overlapping) {
            const auto kernels = pse::ptx::parse(text);
            const pse::ptx::Kernel& kernel = kernels.begin()->second;
            if (blocks % size != 0) pse::ptx::fail("blocks must be whole clusters");
            pse::ptx::run({&kernel, blocks / size, size, threads, 0, arguments.data(), seed, overlapping});
        },
        py::arg("text"), py::arg("blocks"), py::arg("threads"), py::arg("arguments"), py::arg("size") = 1,
        py::arg("seed") = 0, py::arg("overlapping") = false,
        "the first kernel of a PTX file, whose parameters are all of 64 bits");
    py::module_ cuda = m.def_submodule("cuda", "what prosocial_ext._C.cuda has");
    pse::register_cuda(cuda);
}
