// Guided sampling on the CPU: arguments and entry points. python_ref/sampling.py is the definition.
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace pse {

// Logits [rows, vocab] with unit column stride and any row stride; guides [guides, rows, vocab]. Columns from `vocab`
// on are never read.
struct LogitsArgs {
    const void* base;
    DType base_dtype;
    int64_t base_stride;
    const void* guide;  // null when guides == 0
    DType guide_dtype;
    int64_t guide_stride;      // between guides
    int64_t guide_row_stride;  // between rows
    int64_t guides, rows, vocab;
};

// A parameter per row; stride 0 when one value serves all rows.
template <class T>
struct PerRow {
    const T* values;
    int64_t stride;
    T operator[](int64_t row) const { return values[row * stride]; }
};

struct SampleArgs {
    LogitsArgs logits;
    const float* guidance;  // [rows, guides] by the strides below
    int64_t guidance_row_stride, guidance_stride;
    PerRow<float> temperature, top_p, min_p;
    PerRow<int64_t> top_k, seed, offset;
    bool row_in_counter;    // seed is one int: row i draws with counter (offset, i)
    const uint64_t* words;  // [rows] to draw with instead of Philox's, or null (tests)
    int64_t* tokens;        // [rows]; -1 in a row that has no distribution or an argument out of range
    float* logprobs;        // [rows] or null
    void* scratch;          // SamplingKernels::scratch_bytes(vocab, threads)
    int threads;
};

struct LogprobArgs {
    LogitsArgs logits;
    const float* guidance;
    int64_t guidance_row_stride, guidance_stride;
    PerRow<float> temperature;
    float* out;  // [rows, columns], contiguous
    int64_t columns;
    void* scratch;
    int threads;
};

struct SamplingKernels {
    int64_t (*scratch_bytes)(int64_t vocab, int threads);
    int64_t (*sample)(const SampleArgs& args);     // returns the number of bad rows
    int64_t (*logprobs)(const LogprobArgs& args);  // likewise; bad rows are NaN
};

}  // namespace pse
