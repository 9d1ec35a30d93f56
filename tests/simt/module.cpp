// prosocial_simt: the entry points of prosocial_ext._C.cuda on host memory, every kernel run by the harness.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/arithmetic.h"
//
#include "bindings/cuda.h"
#include "harness.h"
#include "planted.h"

namespace py = pybind11;

PYBIND11_MODULE(prosocial_simt, m) {
    m.doc() = "CUDA kernels of prosocial_ext on the CPU (tests/simt/harness.h).";
    m.def(
        "set_schedule",
        [](uint64_t seed, bool interleaved) {
            pse::simt::schedule.seed = seed;
            pse::simt::schedule.interleaved = interleaved;
            pse::simt::counts = {};  // the same launches then run in the same way
        },
        py::arg("seed"), py::arg("interleaved"), "how the next launches run");
    m.def("counts", [] {
        const pse::simt::Counts& c = pse::simt::counts;
        return py::dict(py::arg("launches") = c.launches, py::arg("switches") = c.switches,
                        py::arg("accesses") = c.accesses);
    });
    m.def("planted_names", &pse::simt::planted_names, "kernels for the harness's own tests");
    m.def("planted", &pse::simt::planted, py::arg("name"), "run one; raises what was found");
    py::module_ cuda = m.def_submodule("cuda", "what prosocial_ext._C.cuda has");
    pse::register_cuda(cuda);
}
