// The top-m edit on CUDA: what crosses the border. The story is told in topm.cu. Every launcher works on the target's
// stream, allocates nothing, never synchronises, and returns a cudaError_t (0 is success).
#pragma once
#include <stdint.h>

#include "cuda/target.h"

namespace pse {
namespace cuda {

// The caller's description of one edit or selection; int64 so that the binding is one line a field.
struct TopmCall {
    // Host memory, read before the launcher returns: rows of ten words as pse::TopmTensor (cpu/topm.h), and m per
    // group.
    int64_t tensors = 0, num_tensors = 0, m = 0;
    int64_t per_tensor = 0;  // each tensor is a group of its own, else all are one
    double scale = 1.0;
    int64_t wide = 0;  // a tensor is float64: 64-bit keys
    int64_t one_pass =
        0;               // edit while looking, as a record wants; without one nothing may be read back that was edited
    int64_t select = 0;  // list instead of editing
    int64_t hooks = 0;   // TopmHook of cpu/topm.h, for tests
    int64_t chunk = 0;   // elements per task, a multiple of 256; at most 2^14
    int64_t blocks = 0;  // at most so many blocks in a pass over the data
    // Device memory. Per tensor, written whole: threshold (float, or double when wide), int64 counters.
    int64_t threshold = 0, kept = 0, unchanged = 0, nonfinite = 0;
    // In order; 0 without a record. select: index in the tensor and delta; edit: index in the list and original bits,
    // then -1 and 0 up to `record` entries.
    int64_t indices = 0, values = 0, value_bytes = 0, record = 0;
    int64_t scratch = 0;  // topm_scratch_bytes(), 256-byte aligned, of any content; kept from settle to apply
};

int64_t topm_scratch_bytes(const TopmCall& call);
int topm_settle(const TopmCall& call, const simt::Target& target);  // find what is selected; one_pass: edit it
int topm_apply(const TopmCall& call, const simt::Target& target);   // then, unless one_pass without a record: finish it
int topm_restore(const TopmCall& call, const simt::Target& target);  // or, with one_pass and a record: undo the edit

// params -= scale * values at indices. A damaged delta writes nothing and is flagged in `unchanged` per tensor: -1 an
// index out of range or not ascending, -2 a value that is not finite, -3 a count out of range, -4 (at the first tensor)
// counts that do not sum up. An undo record then holds -1 and 0.
struct SparseCall {
    int64_t tensors = 0, num_tensors = 0;  // as above; tags of base and tuned say what the delta was computed in
    double scale = 1.0;
    int64_t counts = 0, indices = 0, values = 0, values_wide = 0, size = 0;  // device; `size` indices and values
    int64_t unchanged = 0;
    int64_t undo_indices = 0, undo_bits = 0, bits_bytes = 0;  // 0 without a record
    int64_t blocks = 0, scratch = 0;
};

int64_t sparse_scratch_bytes(const SparseCall& call);
int sparse_subtract(const SparseCall& call, const simt::Target& target);

}  // namespace cuda
}  // namespace pse
