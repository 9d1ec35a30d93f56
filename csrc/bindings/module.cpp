// prosocial_ext._C: entry points take addresses, counts and dtype tags. Checks and allocation live in Python
// (prosocial_ext/ops), where errors read best.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

#ifdef PSE_WITH_CUDA
#include "bindings/cuda.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of prosocial_ext; use prosocial_ext.ops.";
    try {
        pse::cpu();  // reads PROSOCIAL_ISA once
    } catch (const std::invalid_argument& error) {
        throw py::import_error(error.what());
    }
    m.attr("version") = PSE_VERSION;
    m.def("isa", [] { return std::string(pse::cpu().isa); }, "the instruction set whose kernels run");
    m.def("available_isas", &pse::available_isas, "instruction sets built and supported here, best last");
    m.def("_set_isa", &pse::select_isa, py::arg("name"), "switch kernels within one process (tests)");

    m.attr("cuda_request") = PSE_CUDA_REQUEST;
#ifdef PSE_WITH_CUDA
    m.attr("cuda_toolkit") = PSE_CUDA_TOOLKIT;
    m.attr("cuda_archs") = PSE_CUDA_ARCHS;
    m.def("cuda_device_count", &pse::cuda::device_count, "(cudaError_t, devices); 35: no driver, or too old");
    py::module_ cuda = m.def_submodule("cuda", "launchers of the CUDA kernels (csrc/cuda)");
    pse::register_cuda(cuda);
    cuda.def("set_launch_overlap", &pse::cuda::set_launch_overlap, py::arg("wanted"),
             "whether kernels may start before those ahead of them have ended (csrc/cuda/device.h)");
#else
    m.attr("cuda_toolkit") = py::none();
    m.attr("cuda_archs") = py::none();
#endif

    pse::register_topm(m);
    pse::register_projection(m);
    pse::register_sampling(m);
    pse::register_limits(m);
    pse::register_stream(m);
    pse::register_files(m);
}
