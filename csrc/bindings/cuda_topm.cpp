#include "bindings/cuda.h"
#include "cuda/target.h"
#include "cuda/topm.h"

namespace py = pybind11;

namespace {

pse::simt::Target target(int device, uintptr_t stream) { return {device, pse::pointer(stream)}; }

}  // namespace

// Field by field as in csrc/cuda/topm.h; prosocial_ext/ops/_cuda_topm.py fills them. Local to the module: the tests'
// twin on host memory has the same classes.
void pse::register_cuda_topm(py::module_& m) {
    using cuda::SparseCall;
    using cuda::TopmCall;
    py::class_<TopmCall>(m, "TopmCall", py::module_local(), "the arguments of a top-m edit (csrc/cuda/topm.h)")
        .def(py::init([] { return TopmCall{}; }))
        .def_readwrite("tensors", &TopmCall::tensors)
        .def_readwrite("num_tensors", &TopmCall::num_tensors)
        .def_readwrite("m", &TopmCall::m)
        .def_readwrite("per_tensor", &TopmCall::per_tensor)
        .def_readwrite("scale", &TopmCall::scale)
        .def_readwrite("wide", &TopmCall::wide)
        .def_readwrite("one_pass", &TopmCall::one_pass)
        .def_readwrite("select", &TopmCall::select)
        .def_readwrite("hooks", &TopmCall::hooks)
        .def_readwrite("chunk", &TopmCall::chunk)
        .def_readwrite("blocks", &TopmCall::blocks)
        .def_readwrite("threshold", &TopmCall::threshold)
        .def_readwrite("kept", &TopmCall::kept)
        .def_readwrite("unchanged", &TopmCall::unchanged)
        .def_readwrite("nonfinite", &TopmCall::nonfinite)
        .def_readwrite("indices", &TopmCall::indices)
        .def_readwrite("values", &TopmCall::values)
        .def_readwrite("value_bytes", &TopmCall::value_bytes)
        .def_readwrite("record", &TopmCall::record)
        .def_readwrite("scratch", &TopmCall::scratch);
    py::class_<SparseCall>(m, "SparseCall", py::module_local(), "the arguments of a sparse edit (csrc/cuda/topm.h)")
        .def(py::init([] { return SparseCall{}; }))
        .def_readwrite("tensors", &SparseCall::tensors)
        .def_readwrite("num_tensors", &SparseCall::num_tensors)
        .def_readwrite("scale", &SparseCall::scale)
        .def_readwrite("counts", &SparseCall::counts)
        .def_readwrite("indices", &SparseCall::indices)
        .def_readwrite("values", &SparseCall::values)
        .def_readwrite("values_wide", &SparseCall::values_wide)
        .def_readwrite("size", &SparseCall::size)
        .def_readwrite("unchanged", &SparseCall::unchanged)
        .def_readwrite("undo_indices", &SparseCall::undo_indices)
        .def_readwrite("undo_bits", &SparseCall::undo_bits)
        .def_readwrite("bits_bytes", &SparseCall::bits_bytes)
        .def_readwrite("blocks", &SparseCall::blocks)
        .def_readwrite("scratch", &SparseCall::scratch);
    m.def("topm_scratch_bytes", &cuda::topm_scratch_bytes, py::arg("call"), "csrc/cuda/topm.cu");
    m.def("sparse_scratch_bytes", &cuda::sparse_scratch_bytes, py::arg("call"), "csrc/cuda/topm_sparse.cu");
    m.def(
        "topm_settle",
        [](const TopmCall& call, int device, uintptr_t stream) {
            return cuda::topm_settle(call, target(device, stream));
        },
        py::arg("call"), py::arg("device"), py::arg("stream"), "find what is selected; one_pass: edit it");
    m.def(
        "topm_apply",
        [](const TopmCall& call, int device, uintptr_t stream) {
            return cuda::topm_apply(call, target(device, stream));
        },
        py::arg("call"), py::arg("device"), py::arg("stream"), "edit or list what topm_settle has found");
    m.def(
        "topm_restore",
        [](const TopmCall& call, int device, uintptr_t stream) {
            return cuda::topm_restore(call, target(device, stream));
        },
        py::arg("call"), py::arg("device"), py::arg("stream"), "undo what topm_settle has edited with a record");
    m.def(
        "sparse_subtract",
        [](const SparseCall& call, int device, uintptr_t stream) {
            return cuda::sparse_subtract(call, target(device, stream));
        },
        py::arg("call"), py::arg("device"), py::arg("stream"), "subtract a sparse delta (csrc/cuda/topm_sparse.cu)");
}
