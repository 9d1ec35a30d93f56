// Guided sampling on CUDA: arguments and launchers (csrc/cuda/sampling*.cu). python_ref/sampling.py is the definition.
// All addresses are the device's. Nothing is allocated, nothing synchronises; results are cudaError_t as int.
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace pse {
namespace cuda {

// Logits [rows, vocab] with unit column stride and any row stride; guides [guides, rows, vocab]. Columns from `vocab`
// on are never read.
struct Logits {
    const void* base;
    DType base_dtype;
    int64_t base_stride;
    const void* guide;  // null when guides == 0
    DType guide_dtype;
    int64_t guide_stride;      // between guides
    int64_t guide_row_stride;  // between rows
    int64_t guides, rows, vocab;
};

struct Knobs {
    float temperature, top_p, min_p, guidance;
    int64_t top_k, seed, offset;
};

// A parameter that rows have of their own: that of row i is at[i * stride]. Null: it is the same in all rows.
template <class T>
struct PerRow {
    const T* at;
    int64_t stride;
};
struct KnobsPerRow {
    PerRow<float> temperature, top_p, min_p, guidance;  // the latter for every guide, next to each other
    PerRow<int64_t> top_k, seed, offset;
};

struct SampleArgs {
    Logits logits;
    Knobs same;             // of all rows,
    KnobsPerRow rows;       // but for these
    bool row_in_counter;    // seed is one int: row i draws with counter (offset, i)
    bool filters;           // false: no log-probs, and the caller knows that no row has top-k or top-p
    const uint64_t* words;  // [rows] to draw with instead of Philox's, or null (tests)
    int64_t* tokens;        // [rows]; -1 in a row that has no distribution or a parameter out of range
    float* logprobs;        // [rows] or null; NaN in such a row
    void* scratch;          // sampling_scratch_bytes(rows, vocab, filters, threads), aligned to 16; any contents
    int threads;            // of a block: 64 or 256 (512 in clusters), or 0 for the launcher's choice
};

struct LogprobArgs {
    Logits logits;
    Knobs same;  // as above; only temperature and guidance are read, the rest says: no filter
    KnobsPerRow rows;
    float* out;  // [rows, columns], contiguous; NaN in a row that has no distribution
    int64_t columns;
    void* scratch;  // sampling_scratch_bytes(rows, vocab, false, threads)
    int threads;
};

int64_t sampling_scratch_bytes(int64_t rows, int64_t vocab, bool filters, int threads);
int guided_sample(const SampleArgs& args, int device, void* stream);     // 2 launches, 3 with filters
int guided_logprobs(const LogprobArgs& args, int device, void* stream);  // 3 launches

// The same tokens by a cluster of blocks per row: 1 launch, and scratch is not used. For rows that fit the shared
// memory of a cluster; none does where the device has no clusters (compute capability below 9.0), or no code for them
// was compiled.
bool sampling_fits_cluster(int64_t vocab, int threads, int device);
int guided_sample_in_clusters(const SampleArgs& args, int device, void* stream);

}  // namespace cuda
}  // namespace pse
