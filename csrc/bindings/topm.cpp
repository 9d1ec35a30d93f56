#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

// Field by field as in csrc/cpu/topm.h; prosocial_ext/ops/topm.py fills it and keeps what it points to alive.
template <class T>
void bind_address(py::class_<pse::TopmCall>& call, const char* name, T* pse::TopmCall::* field) {
    call.def_property(
        name, [field](const pse::TopmCall& c) { return reinterpret_cast<uintptr_t>(c.*field); },
        [field](pse::TopmCall& c, uintptr_t address) { c.*field = pse::pointer<T>(address); });
}

}  // namespace

void pse::register_topm(py::module_& m) {
    py::class_<TopmCall> call(m, "TopmCall", "the arguments of a top-m edit (csrc/cpu/topm.h)");
    call.def(py::init([] { return TopmCall{}; }))
        .def_readwrite("num_tensors", &TopmCall::num_tensors)
        .def_readwrite("per_tensor", &TopmCall::per_tensor)
        .def_readwrite("scale", &TopmCall::scale)
        .def_readwrite("wide", &TopmCall::wide)
        .def_readwrite("one_pass", &TopmCall::one_pass)
        .def_readwrite("check_finite", &TopmCall::check_finite)
        .def_readwrite("select", &TopmCall::select)
        .def_readwrite("hooks", &TopmCall::hooks)
        .def_readwrite("value_bytes", &TopmCall::value_bytes)
        .def_readwrite("threads", &TopmCall::threads);
    bind_address(call, "tensors", &TopmCall::tensors);
    bind_address(call, "m", &TopmCall::m);
    bind_address(call, "threshold", &TopmCall::threshold);
    bind_address(call, "kept", &TopmCall::kept);
    bind_address(call, "unchanged", &TopmCall::unchanged);
    bind_address(call, "nonfinite", &TopmCall::nonfinite);
    bind_address(call, "indices", &TopmCall::indices);
    bind_address(call, "values", &TopmCall::values);
    bind_address(call, "scratch", &TopmCall::scratch);

    m.def(
        "topm_scratch_bytes", [](const TopmCall& c) { return cpu().topm->scratch_bytes(c); }, py::arg("call"),
        "bytes of scratch that topm_run needs (csrc/cpu/topm.cpp)");
    m.def(
        "topm_run", [](const TopmCall& c) { return without_gil([&] { return int(cpu().topm->run(c)); }); },
        py::arg("call"), "edit or select; returns a TopmStatus (csrc/cpu/topm.cpp)");
    m.def(
        "topm_histogram",
        [](const TopmCall& c, uint64_t prefix, int round, uintptr_t histogram) {
            without_gil([&] { cpu().topm->histogram(c, prefix, round, pointer<int64_t>(histogram)); });
        },
        py::arg("call"), py::arg("prefix"), py::arg("round"), py::arg("histogram"),
        "add one chunk's digit counts (csrc/cpu/topm.cpp)");
    m.def(
        "topm_tie_index",
        [](const TopmCall& c, uint64_t key, int64_t ties) {
            int64_t found = 0;
            const int64_t index = without_gil([&] { return cpu().topm->tie_index(c, key, ties, &found); });
            return std::pair<int64_t, int64_t>(index, found);
        },
        py::arg("call"), py::arg("key"), py::arg("ties"), "(index of the last tie to keep, ties found)");
    m.def(
        "topm_apply",
        [](const TopmCall& c, uint64_t key, int64_t index) { without_gil([&] { cpu().topm->apply(c, key, index); }); },
        py::arg("call"), py::arg("key"), py::arg("index"), "edit what (key, index) holds (csrc/cpu/topm.cpp)");
    m.def(
        "topm_sparse",
        [](uintptr_t tensors, int64_t num_tensors, uintptr_t counts, uintptr_t indices, uintptr_t values,
           bool values_wide, uintptr_t delta_wide, double scale, uintptr_t unchanged, uintptr_t undo_indices,
           uintptr_t bits, int bits_bytes, int threads) {
            without_gil([&] {
                cpu().topm->sparse(pointer<const TopmTensor>(tensors), num_tensors, pointer<const int64_t>(counts),
                                   pointer<const int64_t>(indices), pointer(values), values_wide,
                                   pointer<const int64_t>(delta_wide), scale, pointer<int64_t>(unchanged),
                                   pointer<int64_t>(undo_indices), pointer(bits), bits_bytes, threads);
            });
        },
        py::arg("tensors"), py::arg("num_tensors"), py::arg("counts"), py::arg("indices"), py::arg("values"),
        py::arg("values_wide"), py::arg("delta_wide"), py::arg("scale"), py::arg("unchanged"), py::arg("undo_indices"),
        py::arg("bits"), py::arg("bits_bytes"), py::arg("threads"), "subtract a sparse delta (csrc/cpu/topm.cpp)");
    m.def(
        "topm_first_bad_index",
        [](uintptr_t numel, int64_t num_tensors, uintptr_t counts, uintptr_t indices, int threads) {
            return without_gil([&] {
                return cpu().topm->first_bad_index(pointer<const int64_t>(numel), num_tensors,
                                                   pointer<const int64_t>(counts), pointer<const int64_t>(indices),
                                                   threads);
            });
        },
        py::arg("numel"), py::arg("num_tensors"), py::arg("counts"), py::arg("indices"), py::arg("threads"),
        "position of the first index out of range or out of order, or -1 (csrc/cpu/topm.cpp)");
}
