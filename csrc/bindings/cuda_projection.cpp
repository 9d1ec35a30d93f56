#include "bindings/cuda.h"
#include "core/gram_order.h"
#include "cuda/projection.h"

namespace py = pybind11;

// Field by field as in csrc/cuda/projection.h; prosocial_ext/ops/_cuda_projection.py fills it. Local to its module,
// since the harness's has a class of this name too.
void pse::register_cuda_projection(py::module_& m) {
    using cuda::ProjectionCall;
    py::class_<ProjectionCall>(m, "ProjectionCall", py::module_local(),
                               "the arguments of gram and project (csrc/cuda/projection.h)")
        .def(py::init<>())
        .def_readwrite("grads", &ProjectionCall::grads)
        .def_readwrite("table", &ProjectionCall::table)
        .def_readwrite("tensors", &ProjectionCall::tensors)
        .def_readwrite("groups", &ProjectionCall::groups)
        .def_readwrite("k", &ProjectionCall::k)
        .def_readwrite("n", &ProjectionCall::n)
        .def_readwrite("blocks", &ProjectionCall::blocks)
        .def_property(
            "dtype", [](const ProjectionCall& c) { return int(c.dtype); },
            [](ProjectionCall& c, int tag) { c.dtype = DType(tag); })
        .def_readwrite("gram", &ProjectionCall::gram)
        .def_readwrite("scratch", &ProjectionCall::scratch)
        .def_property(
            "path", [](const ProjectionCall& c) { return int(c.path); },
            [](ProjectionCall& c, int path) { c.path = cuda::GramPath(path); })
        .def_readwrite("weights", &ProjectionCall::weights)
        .def_readwrite("order", &ProjectionCall::order)
        .def_readwrite("seed", &ProjectionCall::seed)
        .def_property(
            "mode", [](const ProjectionCall& c) { return int(c.mode); },
            [](ProjectionCall& c, int mode) { c.mode = ProjectionOrder(mode); })
        .def_readwrite("mean", &ProjectionCall::mean)
        .def_readwrite("projected", &ProjectionCall::projected)
        .def_readwrite("finite", &ProjectionCall::finite)
        .def_readwrite("out", &ProjectionCall::out);

    m.attr("projection_most_objectives") = cuda::kMostObjectives;
    m.attr("projection_block") = baseline::kGramBlock;
    m.def("projection_scratch_bytes", &cuda::projection_scratch_bytes, py::arg("groups"), py::arg("k"),
          py::arg("blocks"), "bytes of scratch, blocks per group");
    m.def(
        "gram",
        [](const ProjectionCall& call, int device, uintptr_t stream) {
            return cuda::gram(call, device, pointer(stream));
        },
        py::arg("call"), py::arg("device"), py::arg("stream"), "Gram matrices (csrc/cuda/projection.cu)");
    m.def(
        "project",
        [](const ProjectionCall& call, int device, uintptr_t stream) {
            return cuda::project(call, device, pointer(stream));
        },
        py::arg("call"), py::arg("device"), py::arg("stream"), "PCGrad (csrc/cuda/projection.cu)");
    m.def(
        "projection_table",
        [](uintptr_t words, int64_t count, int64_t to, int device, uintptr_t stream) {
            return cuda::write_words(pointer<const int64_t>(words), count, to, device, pointer(stream));
        },
        py::arg("words"), py::arg("count"), py::arg("to"), py::arg("device"), py::arg("stream"),
        "copy host words to the device by kernel argument (csrc/cuda/projection.cu)");
}
