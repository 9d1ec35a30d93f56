#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bindings.h"
#include "core/philox.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace pse {
namespace {

// (address, dtype tag, guide stride, row stride) of the base (guide stride unused) and of the stacked guides.
using View = std::tuple<uintptr_t, int, int64_t, int64_t>;

LogitsArgs logits_args(const View& base, const View& guide, int64_t guides, int64_t rows, int64_t vocab) {
    LogitsArgs args;
    args.base = pointer(std::get<0>(base));
    args.base_dtype = DType(std::get<1>(base));
    args.base_stride = std::get<3>(base);
    args.guide = pointer(std::get<0>(guide));
    args.guide_dtype = DType(std::get<1>(guide));
    args.guide_stride = std::get<2>(guide);
    args.guide_row_stride = std::get<3>(guide);
    args.guides = guides;
    args.rows = rows;
    args.vocab = vocab;
    return args;
}

}  // namespace
}  // namespace pse

void pse::register_sampling(py::module_& m) {
    m.def(
        "sampling_scratch_bytes",
        [](int64_t vocab, int threads) { return cpu().sampling->scratch_bytes(vocab, threads); }, py::arg("vocab"),
        py::arg("threads"), "scratch that guided_sample, guided_sample_rows and guided_logprobs need");
    m.def(
        "guided_sample",
        [](const View& base, const View& guide, int64_t guides, int64_t rows, int64_t vocab, float guidance,
           float temperature, int64_t top_k, float top_p, float min_p, int64_t seed, int64_t offset, uintptr_t tokens,
           uintptr_t scratch, int threads) {
            SampleArgs args;
            args.logits = logits_args(base, guide, guides, rows, vocab);
            args.guidance = &guidance;
            args.guidance_row_stride = args.guidance_stride = 0;
            args.temperature = {&temperature, 0};
            args.top_k = {&top_k, 0};
            args.top_p = {&top_p, 0};
            args.min_p = {&min_p, 0};
            args.seed = {&seed, 0};
            args.offset = {&offset, 0};
            args.row_in_counter = true;
            args.words = nullptr;
            args.tokens = pointer<int64_t>(tokens);
            args.logprobs = nullptr;
            args.scratch = pointer(scratch);
            args.threads = threads;
            return without_gil([&] { return cpu().sampling->sample(args); });
        },
        py::arg("base"), py::arg("guide"), py::arg("guides"), py::arg("rows"), py::arg("vocab"), py::arg("guidance"),
        py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
        py::arg("offset"), py::arg("tokens"), py::arg("scratch"), py::arg("threads"),
        "one set of parameters for all rows; returns the number of bad rows (csrc/cpu/sampling.h)");
    m.def(
        "guided_sample_rows",
        [](const View& base, const View& guide, int64_t guides, int64_t rows, int64_t vocab, uintptr_t knobs,
           uintptr_t counters, bool row_in_counter, uintptr_t tokens, uintptr_t logprobs, uintptr_t scratch,
           int threads, uintptr_t words) {
            const int64_t width = 3 + guides;  // temperature, top_p, min_p, guidance of each guide
            const float* knob = pointer<const float>(knobs);
            const int64_t* counter = pointer<const int64_t>(counters);  // top_k, seed, offset
            SampleArgs args;
            args.logits = logits_args(base, guide, guides, rows, vocab);
            args.temperature = {knob, width};
            args.top_p = {knob + 1, width};
            args.min_p = {knob + 2, width};
            args.guidance = knob + 3;
            args.guidance_row_stride = width;
            args.guidance_stride = 1;
            args.top_k = {counter, 3};
            args.seed = {counter + 1, 3};
            args.offset = {counter + 2, 3};
            args.row_in_counter = row_in_counter;
            args.words = pointer<const uint64_t>(words);
            args.tokens = pointer<int64_t>(tokens);
            args.logprobs = pointer<float>(logprobs);
            args.scratch = pointer(scratch);
            args.threads = threads;
            return without_gil([&] { return cpu().sampling->sample(args); });
        },
        py::arg("base"), py::arg("guide"), py::arg("guides"), py::arg("rows"), py::arg("vocab"), py::arg("knobs"),
        py::arg("counters"), py::arg("row_in_counter"), py::arg("tokens"), py::arg("logprobs"), py::arg("scratch"),
        py::arg("threads"), py::arg("words") = 0,
        "parameters per row: fp32 knobs [rows, 3 + guides], int64 counters [rows, 3]; words [rows] replace the draw");
    m.def(
        "guided_logprobs",
        [](const View& base, const View& guide, int64_t guides, int64_t rows, int64_t vocab, int64_t columns,
           uintptr_t knobs, uintptr_t out, uintptr_t scratch, int threads) {
            const int64_t width = 1 + guides;  // temperature, guidance of each guide
            const float* knob = pointer<const float>(knobs);
            LogprobArgs args;
            args.logits = logits_args(base, guide, guides, rows, vocab);
            args.temperature = {knob, width};
            args.guidance = knob + 1;
            args.guidance_row_stride = width;
            args.guidance_stride = 1;
            args.out = pointer<float>(out);
            args.columns = columns;
            args.scratch = pointer(scratch);
            args.threads = threads;
            return without_gil([&] { return cpu().sampling->logprobs(args); });
        },
        py::arg("base"), py::arg("guide"), py::arg("guides"), py::arg("rows"), py::arg("vocab"), py::arg("columns"),
        py::arg("knobs"), py::arg("out"), py::arg("scratch"), py::arg("threads"),
        "fp32 log-probs [rows, columns]; fp32 knobs [rows, 1 + guides]; returns the number of bad rows");
    m.def(
        "philox_u64",
        [](uint64_t key, uint64_t counter_low, uint64_t counter_high) {
            return baseline::philox_u64(key, counter_low, counter_high);
        },
        py::arg("key"), py::arg("counter_low"), py::arg("counter_high"), "one uniform word (csrc/core/philox.h)");
}
