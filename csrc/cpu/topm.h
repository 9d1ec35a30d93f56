// The top-m edit on the CPU: what crosses the border. The story is told in topm.cpp.
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace pse {

// One row of the int64 table that prosocial_ext/ops/topm.py builds. Tags are pse::DType.
struct TopmTensor {
    int64_t params, base, tuned, importance;  // addresses of contiguous data; params is unused when selecting
    int64_t params_dtype, base_dtype, tuned_dtype;
    int64_t importance_dtype;  // -1: entries are ranked by |delta| alone
    int64_t numel;
    int64_t first;  // flat index of the tensor's first element in the list
};

enum TopmHook : int {        // the unlucky paths, forced by tests
    kHookOverflow = 1,       // no room for candidates
    kHookTooFew = 2,         // the lower edge of the bracket is too high
    kHookTooMany = 4,        // the upper edge is too low
    kHookTwoPass = 8,        // no sample: exact radix select
    kHookAlwaysSample = 16,  // sample whatever the size
    kHookLongIndex = 32,     // 64-bit indices whatever the size
    kHookNarrow = 64,        // CUDA: take digits off the sample as if it were a large one
};

enum TopmStatus : int { kTopmDone = 0, kTopmNotFinite = 1, kTopmSpoilt = 2 };

struct TopmCall {
    const TopmTensor* tensors;
    int64_t num_tensors;
    int per_tensor;    // each tensor is a group of its own, else all are one
    const int64_t* m;  // per group
    double scale;
    int wide;          // a tensor is float64: 64-bit keys
    int one_pass;      // edit while looking: nothing is checked, recorded or read back from what was edited
    int check_finite;  // an entry that may not be selected stops the call before anything is written
    int select;        // no edit: indices and deltas of the selected
    int hooks;
    void* threshold;                        // per tensor: double when wide, else float
    int64_t *kept, *unchanged, *nonfinite;  // per tensor, zeroed by the caller
    int64_t* indices;  // select: flat index within the tensor; edit: flat index in the list, or null without a record
    void* values;      // select: deltas; edit: the original bits
    int value_bytes;
    void* scratch;  // scratch_bytes()
    int threads;
};

struct TopmKernels {
    int64_t (*scratch_bytes)(const TopmCall& call);
    TopmStatus (*run)(const TopmCall& call);

    // The pieces of the exact two-pass select, for streams and ranks. A digit is 16 bits of the key.
    // Adds to histogram[65536] the digit below the settled high bits of every eligible key; call.nonfinite is counted
    // in the first round.
    void (*histogram)(const TopmCall& call, uint64_t prefix, int round, int64_t* histogram);
    // The flat index of the ties-th entry (from 1) of this key, or the last index where there are fewer.
    int64_t (*tie_index)(const TopmCall& call, uint64_t key, int64_t ties, int64_t* found);
    // Edits the entries held by (key, index).
    void (*apply)(const TopmCall& call, uint64_t key, int64_t index);

    // params -= scale * values at indices (flat within each tensor, counts[i] of them for tensor i). `bits` may be
    // null.
    void (*sparse)(const TopmTensor* tensors, int64_t num_tensors, const int64_t* counts, const int64_t* indices,
                   const void* values, int values_wide, const int64_t* delta_wide, double scale, int64_t* unchanged,
                   int64_t* undo_indices, void* bits, int bits_bytes, int threads);
    // The first position whose index is out of range or not above the one before it in its tensor, or -1.
    int64_t (*first_bad_index)(const int64_t* numel, int64_t num_tensors, const int64_t* counts, const int64_t* indices,
                               int threads);
};

}  // namespace pse
