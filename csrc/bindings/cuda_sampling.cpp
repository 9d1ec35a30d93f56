#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>

#include "bindings/cuda.h"
#include "cuda/sampling.h"

namespace py = pybind11;

namespace pse {
namespace {

// (address, dtype tag, guide stride, row stride) of the base (guide stride unused) and of the stacked guides.
using CudaView = std::tuple<uintptr_t, int, int64_t, int64_t>;

cuda::Logits cuda_logits(const CudaView& base, const CudaView& guide, int64_t guides, int64_t rows, int64_t vocab) {
    cuda::Logits logits;
    logits.base = pointer(std::get<0>(base));
    logits.base_dtype = DType(std::get<1>(base));
    logits.base_stride = std::get<3>(base);
    logits.guide = pointer(std::get<0>(guide));
    logits.guide_dtype = DType(std::get<1>(guide));
    logits.guide_stride = std::get<2>(guide);
    logits.guide_row_stride = std::get<3>(guide);
    logits.guides = guides;
    logits.rows = rows;
    logits.vocab = vocab;
    return logits;
}

// In the order of cuda::Knobs: (value in all rows), and (address, stride) of those that are per row.
using Same = std::tuple<float, float, float, float, int64_t, int64_t, int64_t>;
using PerRow = std::array<std::pair<uintptr_t, int64_t>, 7>;

cuda::Knobs knobs_of(const Same& same) {
    return std::apply([](auto... values) { return cuda::Knobs{values...}; }, same);
}

cuda::KnobsPerRow knobs_of(const PerRow& rows) {
    const auto real = [&](int i) { return cuda::PerRow<float>{pointer<const float>(rows[i].first), rows[i].second}; };
    const auto whole = [&](int i) {
        return cuda::PerRow<int64_t>{pointer<const int64_t>(rows[i].first), rows[i].second};
    };
    return {real(0), real(1), real(2), real(3), whole(4), whole(5), whole(6)};
}

int sampled(const cuda::SampleArgs& args, bool clusters, int device, void* stream) {
    return clusters ? cuda::guided_sample_in_clusters(args, device, stream) : cuda::guided_sample(args, device, stream);
}

}  // namespace
}  // namespace pse

void pse::register_cuda_sampling(py::module_& m) {
    m.def("sampling_scratch_bytes", &cuda::sampling_scratch_bytes, py::arg("rows"), py::arg("vocab"),
          py::arg("filters"), py::arg("threads"),
          "device scratch that the launchers below need (csrc/cuda/sampling.h)");
    m.def("sampling_fits_cluster", &cuda::sampling_fits_cluster, py::arg("vocab"), py::arg("threads"),
          py::arg("device"), "whether the launchers below can sample with clusters=True, then without scratch");
    m.def(
        "guided_sample",
        [](const CudaView& base, const CudaView& guide, int64_t guides, int64_t rows, int64_t vocab, float guidance,
           float temperature, int64_t top_k, float top_p, float min_p, int64_t seed, int64_t offset, bool filters,
           uintptr_t tokens, uintptr_t scratch, bool clusters, int threads, int device, uintptr_t stream) {
            cuda::SampleArgs args = {};
            args.logits = cuda_logits(base, guide, guides, rows, vocab);
            args.same = {temperature, top_p, min_p, guidance, top_k, seed, offset};
            args.row_in_counter = true;
            args.filters = filters;
            args.tokens = pointer<int64_t>(tokens);
            args.scratch = pointer(scratch);
            args.threads = threads;
            return sampled(args, clusters, device, pointer(stream));
        },
        py::arg("base"), py::arg("guide"), py::arg("guides"), py::arg("rows"), py::arg("vocab"), py::arg("guidance"),
        py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
        py::arg("offset"), py::arg("filters"), py::arg("tokens"), py::arg("scratch"), py::arg("clusters"),
        py::arg("threads"), py::arg("device"), py::arg("stream"),
        "one set of parameters for all rows (csrc/cuda/sampling.h)");
    m.def(
        "guided_sample_rows",
        [](const CudaView& base, const CudaView& guide, int64_t guides, int64_t rows, int64_t vocab, const Same& same,
           const PerRow& per_row, bool row_in_counter, bool filters, uintptr_t words, uintptr_t tokens,
           uintptr_t logprobs, uintptr_t scratch, bool clusters, int threads, int device, uintptr_t stream) {
            cuda::SampleArgs args = {};
            args.logits = cuda_logits(base, guide, guides, rows, vocab);
            args.same = knobs_of(same);
            args.rows = knobs_of(per_row);
            args.row_in_counter = row_in_counter;
            args.filters = filters;
            args.words = pointer<const uint64_t>(words);
            args.tokens = pointer<int64_t>(tokens);
            args.logprobs = pointer<float>(logprobs);
            args.scratch = pointer(scratch);
            args.threads = threads;
            return sampled(args, clusters, device, pointer(stream));
        },
        py::arg("base"), py::arg("guide"), py::arg("guides"), py::arg("rows"), py::arg("vocab"), py::arg("same"),
        py::arg("per_row"), py::arg("row_in_counter"), py::arg("filters"), py::arg("words"), py::arg("tokens"),
        py::arg("logprobs"), py::arg("scratch"), py::arg("clusters"), py::arg("threads"), py::arg("device"),
        py::arg("stream"),
        "parameters that all rows share or have of their own; words [rows] replace the draw (csrc/cuda/sampling.h)");
    m.def(
        "guided_logprobs",
        [](const CudaView& base, const CudaView& guide, int64_t guides, int64_t rows, int64_t vocab, int64_t columns,
           const Same& same, const PerRow& per_row, uintptr_t out, uintptr_t scratch, int threads, int device,
           uintptr_t stream) {
            cuda::LogprobArgs args = {};
            args.logits = cuda_logits(base, guide, guides, rows, vocab);
            args.same = knobs_of(same);
            args.rows = knobs_of(per_row);
            args.out = pointer<float>(out);
            args.columns = columns;
            args.scratch = pointer(scratch);
            args.threads = threads;
            return cuda::guided_logprobs(args, device, pointer(stream));
        },
        py::arg("base"), py::arg("guide"), py::arg("guides"), py::arg("rows"), py::arg("vocab"), py::arg("columns"),
        py::arg("same"), py::arg("per_row"), py::arg("out"), py::arg("scratch"), py::arg("threads"), py::arg("device"),
        py::arg("stream"), "fp32 log-probs [rows, columns] (csrc/cuda/sampling.h)");
}
