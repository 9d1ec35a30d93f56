#include "bindings/bindings.h"
#include "cpu/dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace pse {
namespace {

// Fresh memory costs more to fault in by 4 KB pages than to fill: 20 of 39 ms at 80 MB. A hint; failure is harmless.
void prefer_huge_pages(uint64_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uint64_t kHuge = 2u << 20;
    const uint64_t start = (address + kHuge - 1) / kHuge * kHuge, end = (address + uint64_t(bytes)) / kHuge * kHuge;
    if (bytes >= int64_t(4 * kHuge)) madvise(pointer(start), end - start, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

// Lists pass the addresses of [tensors] arrays; contiguous [groups, k, n] passes `dense` and fills them from here.
struct GradientsArgument {
    Gradients value{};
    int64_t counts[1]{};
    int64_t first_block[2]{};
    int32_t dtypes[1]{};

    GradientsArgument(uintptr_t dense, int64_t groups, int64_t k, int64_t n, int dtype)
        : counts{n}, first_block{0, (n + cpu().projection->block - 1) / cpu().projection->block}, dtypes{dtype} {
        value = {pointer<const char>(dense), nullptr, counts, first_block, dtypes, 1, groups, k};
    }
    GradientsArgument(const GradientsArgument&) = delete;
};

Gradients list_gradients(uintptr_t table, uintptr_t counts, uintptr_t first_block, uintptr_t dtypes, int64_t tensors,
                         int64_t k) {
    return {nullptr,
            pointer<const uint64_t>(table),
            pointer<const int64_t>(counts),
            pointer<const int64_t>(first_block),
            pointer<const int32_t>(dtypes),
            tensors,
            1,
            k};
}

// Gram, recurrence, combination; without `combine_to` only the first. False: a squared norm is not finite, no output.
bool run(const Gradients& grads, uintptr_t gram, uintptr_t weights, uintptr_t order, uint64_t seed, int mode, bool mean,
         uintptr_t projected, uintptr_t combined, const uint64_t* out, uintptr_t scratch, int threads) {
    return without_gil([&] {
        const ProjectionKernels& kernels = *cpu().projection;
        kernels.gram(grads, pointer<double>(gram), pointer<char>(scratch), threads);
        if (out == nullptr) return true;
        const Recurrence recurrence{pointer<const double>(gram),   pointer<const double>(weights),
                                    pointer<const int64_t>(order), seed,
                                    ProjectionOrder(mode),         mean,
                                    pointer<double>(projected),    pointer<double>(combined)};
        if (!kernels.recur(recurrence, grads.groups, grads.k, pointer<char>(scratch), threads)) return false;
        for (int64_t t = 0; t < grads.tensors; ++t)
            prefer_huge_pages(out[t], grads.groups * grads.counts[t] * dtype_size(DType(grads.dtypes[t])));
        kernels.combine(grads, recurrence.combined, recurrence.weights, out, pointer<char>(scratch), threads);
        return true;
    });
}

}  // namespace

void register_projection(py::module_& m) {
    m.def("projection_block", [] { return cpu().projection->block; }, "elements per block of partial Gram sums");
    m.def(
        "projection_scratch_bytes",
        [](int64_t groups, int64_t k, int64_t blocks, int threads) {
            const int64_t first_block[2] = {0, blocks};
            Gradients grads{};
            grads.first_block = first_block;
            grads.tensors = 1;
            grads.groups = groups;
            grads.k = k;
            return cpu().projection->scratch_bytes(grads, threads);
        },
        py::arg("groups"), py::arg("k"), py::arg("blocks"), py::arg("threads"), "bytes of scratch, blocks per group");
    m.def(
        "gram_dense",
        [](uintptr_t grads, int64_t groups, int64_t k, int64_t n, int dtype, uintptr_t gram, uintptr_t scratch,
           int threads) {
            const GradientsArgument argument(grads, groups, k, n, dtype);
            run(argument.value, gram, 0, 0, 0, 0, false, 0, 0, nullptr, scratch, threads);
        },
        py::arg("grads"), py::arg("groups"), py::arg("k"), py::arg("n"), py::arg("dtype"), py::arg("gram"),
        py::arg("scratch"), py::arg("threads"), "Gram matrices of contiguous [groups, k, n] (csrc/cpu/projection.h)");
    m.def(
        "gram_lists",
        [](uintptr_t table, uintptr_t counts, uintptr_t first_block, uintptr_t dtypes, int64_t tensors, int64_t k,
           uintptr_t gram, uintptr_t scratch, int threads) {
            run(list_gradients(table, counts, first_block, dtypes, tensors, k), gram, 0, 0, 0, 0, false, 0, 0, nullptr,
                scratch, threads);
        },
        py::arg("table"), py::arg("counts"), py::arg("first_block"), py::arg("dtypes"), py::arg("tensors"),
        py::arg("k"), py::arg("gram"), py::arg("scratch"), py::arg("threads"), "Gram matrix of k lists of tensors");
    m.def(
        "project_dense",
        [](uintptr_t grads, int64_t groups, int64_t k, int64_t n, int dtype, uintptr_t gram, uintptr_t weights,
           uintptr_t order, uint64_t seed, int mode, bool mean, uintptr_t projected, uintptr_t combined, uintptr_t out,
           uintptr_t scratch, int threads) {
            const GradientsArgument argument(grads, groups, k, n, dtype);
            const uint64_t outs[1] = {out};
            return run(argument.value, gram, weights, order, seed, mode, mean, projected, combined, outs, scratch,
                       threads);
        },
        py::arg("grads"), py::arg("groups"), py::arg("k"), py::arg("n"), py::arg("dtype"), py::arg("gram"),
        py::arg("weights"), py::arg("order"), py::arg("seed"), py::arg("mode"), py::arg("mean"), py::arg("projected"),
        py::arg("combined"), py::arg("out"), py::arg("scratch"), py::arg("threads"),
        "PCGrad of contiguous [groups, k, n]; False where a gradient is not finite");
    m.def(
        "project_lists",
        [](uintptr_t table, uintptr_t counts, uintptr_t first_block, uintptr_t dtypes, int64_t tensors, int64_t k,
           uintptr_t gram, uintptr_t weights, uintptr_t order, uint64_t seed, int mode, bool mean, uintptr_t projected,
           uintptr_t combined, uintptr_t out, uintptr_t scratch, int threads) {
            return run(list_gradients(table, counts, first_block, dtypes, tensors, k), gram, weights, order, seed, mode,
                       mean, projected, combined, pointer<const uint64_t>(out), scratch, threads);
        },
        py::arg("table"), py::arg("counts"), py::arg("first_block"), py::arg("dtypes"), py::arg("tensors"),
        py::arg("k"), py::arg("gram"), py::arg("weights"), py::arg("order"), py::arg("seed"), py::arg("mode"),
        py::arg("mean"), py::arg("projected"), py::arg("combined"), py::arg("out"), py::arg("scratch"),
        py::arg("threads"), "PCGrad of k lists of tensors; `out` is an array of [tensors] addresses");
}

}  // namespace pse
