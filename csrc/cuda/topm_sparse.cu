// params -= scale * values at the indices of a sparse delta, which may come from a stranger.
//
// Bytes  16 to 24 per entry of the delta, and a 32-byte sector of params read and written per entry (fewer where
//        entries are neighbours). Bound by sectors: 1e7 scattered entries move 0.9 GB.
// Story  1 counts: in range, and their sum; where each tensor's entries start
//        2 indices: in range and ascending in their tensor; values: finite
//        3 subtract, unless 1 or 2 found damage: then nothing is written and `unchanged` says where it is
// The flags stay on the device: the host does not wait. raise_if_bad() reads them.
#include <vector>

#include "cpu/topm.h"
#include "cuda/topm.h"
#include "cuda/topm_entries.cuh"

namespace pse {
namespace cuda {

// What is wrong with a tensor's part of the delta; the flag in `unchanged` is minus this. Of index and value, the
// index.
enum Damage : uint32_t { kSound = 0, kBadIndex = 1, kBadValue = 2, kBadCount = 3, kBadSum = 4 };

struct SparseView {
    Global<const int64_t> table, counts, indices;
    Global<int64_t> starts;   // per tensor its first entry, then the size
    Global<uint32_t> damage;  // per tensor, then whether there is any
    Global<int64_t> unchanged;
    int64_t values, values_wide, size;
    int64_t undo_indices, undo_bits, bits_bytes;
    int64_t num_tensors;
    double scale;
};

PSE_DEVICE double value_of(const SparseView& v, int64_t e) {
    if (v.values_wide != 0) return load(simt::global<const double>(v.values, v.size), e);
    return double(load(simt::global<const float>(v.values, v.size), e));
}
PSE_HD bool is_finite(double x) { return (double_bits(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

// 1: one block. Counts are checked one by one, so the sums cannot overflow before they are known to be sound.
PSE_KERNEL(kThreads) sparse_counts(SparseView v) {
    after_earlier_launches();
    PSE_SHARED(int64_t, sums, kWarps);
    int64_t before = 0, all_bad = 0;
    for (int64_t tile = 0; tile < v.num_tensors; tile += kThreads) {
        const int64_t i = tile + thread();
        const bool inside = i < v.num_tensors;
        const int64_t count = inside ? load(v.counts, i) : 0;
        const int64_t numel = inside ? load(v.table, i * kTensorWords + kNumel) : 0;
        const bool bad = count < 0 || count > numel;
        int64_t total, bad_here;
        const int64_t start = before + scan_block(sums, bad ? int64_t(0) : count, &total);
        scan_block(sums, bad ? int64_t(1) : int64_t(0), &bad_here);
        if (inside) store(v.starts, i, start);
        if (inside) store(v.damage, i, uint32_t(bad ? kBadCount : kSound));
        if (inside) store(v.unchanged, i, int64_t(0));
        before += total;
        all_bad += bad_here;
    }
    if (thread() != 0) return;  // of the first tensor, thread 0 itself has written the damage
    store(v.starts, v.num_tensors, v.size);
    if (all_bad == 0 && before != v.size) store(v.damage, 0, uint32_t(kBadSum));
    store(v.damage, v.num_tensors, uint32_t(all_bad != 0 || before != v.size ? 1 : 0));
}

// 2: starts are not to be trusted where counts are damaged.
PSE_KERNEL(kThreads) sparse_check(SparseView v, Global<uint32_t> found) {
    after_earlier_launches();
    const uint32_t damaged = load(v.damage, v.num_tensors);
    if (damaged != 0) return;
    for (int64_t e = block() * kThreads + thread(); e < v.size; e += blocks() * kThreads) {
        const int64_t i = find_row(v.starts, 1, 0, v.num_tensors, e);
        const int64_t index = load(v.indices, e), start = load(v.starts, i);
        const int64_t before = e > start ? load(v.indices, e - 1) : -1;
        const int64_t numel = load(v.table, i * kTensorWords + kNumel);
        uint32_t bad = kSound;
        if (index <= before || index < 0 || index >= numel) bad = kBadIndex;
        if (bad == kSound && !is_finite(value_of(v, e))) bad = kBadValue;
        if (bad == kSound) continue;
        atomic_or(found, i, bad);
        atomic_or(found, v.num_tensors, 1u);
    }
}

// 3
PSE_KERNEL(kThreads) sparse_apply(SparseView v, Global<uint32_t> found) {
    after_earlier_launches();
    const bool damaged = load(v.damage, v.num_tensors) != 0 || load(found, v.num_tensors) != 0;
    if (damaged) {
        for (int64_t i = block() * kThreads + thread(); i < v.num_tensors; i += blocks() * kThreads) {
            const uint32_t count = load(v.damage, i), entry = load(found, i);
            const uint32_t what = count != kSound ? count : (entry & kBadIndex) != 0 ? uint32_t(kBadIndex) : entry;
            store(v.unchanged, i, -int64_t(what));
        }
    }
    const int64_t steps = (v.size + kThreads - 1) / kThreads;
    for (int64_t step = block(); step < steps; step += blocks()) {  // whole warps, for the sums
        const int64_t e = step * kThreads + thread();
        const bool inside = e < v.size;
        if (damaged) {
            if (!inside || v.undo_indices == 0) continue;
            store(simt::global<int64_t>(v.undo_indices, v.size), e, int64_t(-1));
            put_bits(v.undo_bits, v.size, e, v.bits_bytes, 0);
            continue;
        }
        const int64_t i = find_row(v.starts, 1, 0, v.num_tensors, inside ? e : v.size - 1);
        int same = 0;
        if (inside) {
            const TensorRow t = tensor_row(v.table, i);
            const int64_t index = load(v.indices, e);
            const double value = value_of(v, e);
            int64_t bits = 0;
            const auto keep = [&](auto x) { bits = bits_of(x); };
            same = t.in_double() ? edit_one(t, index, value, v.scale, keep)
                                 : edit_one(t, index, float(value), float(v.scale), keep);
            if (v.undo_indices != 0) {
                store(simt::global<int64_t>(v.undo_indices, v.size), e, t.first + index);
                put_bits(v.undo_bits, v.size, e, v.bits_bytes, bits);
            }
        }
        const int64_t leader = shuffle(i, 0);
        if (ballot(i == leader) == kAllLanes)
            add_count(v.unchanged, leader, same);
        else if (same != 0)
            atomic_add(v.unchanged, i, int64_t(1));
    }
}

static int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t sparse_scratch_bytes(const SparseCall& call) {
    const int64_t n = call.num_tensors;
    return rounded(n * kTensorWords * 8) + rounded((n + 1) * 8) + 2 * rounded((n + 1) * 4);
}

int sparse_subtract(const SparseCall& call, const Target& target) {
    const int64_t n = call.num_tensors, f64 = int64_t(DType::f64);
    const TopmTensor* tensors = reinterpret_cast<const TopmTensor*>(call.tensors);
    std::vector<int64_t> table;
    for (int64_t i = 0; i < n; ++i) {
        const TopmTensor& t = tensors[i];
        const bool in_double = t.params_dtype == f64 || t.base_dtype == f64;
        table.insert(table.end(),
                     {t.params, 0, 0, 0, t.params_dtype | (in_double ? kInDouble : 0), t.numel, t.first, 0});
    }
    const int64_t starts = call.scratch + rounded(n * kTensorWords * 8);
    const int64_t damage = starts + rounded((n + 1) * 8), found = damage + rounded((n + 1) * 4);
    SparseView v;
    v.table = simt::global<int64_t>(call.scratch, n * kTensorWords);
    v.counts = simt::global<int64_t>(call.counts, n);
    v.indices = simt::global<int64_t>(call.indices, call.size);
    v.starts = simt::global<int64_t>(starts, n + 1);
    v.damage = simt::global<uint32_t>(damage, n + 1);
    v.unchanged = simt::global<int64_t>(call.unchanged, n);
    v.values = call.values;
    v.values_wide = call.values_wide;
    v.size = call.size;
    v.undo_indices = call.undo_indices;
    v.undo_bits = call.undo_bits;
    v.bits_bytes = call.bits_bytes;
    v.num_tensors = n;
    v.scale = call.scale;
    const Global<uint32_t> flags = simt::global<uint32_t>(found, n + 1);
    const int64_t blocks = blocks_for((call.size + kThreads - 1) / kThreads, call.blocks);
    int error = put_words(target, call.scratch, table.data(), int64_t(table.size()));
    if (error == 0) error = fill_zero(target, reinterpret_cast<void*>(found), (n + 1) * 4);
    if (error == 0) error = launch("sparse_counts", target, 1, kThreads, sparse_counts, v);
    if (error == 0) error = launch("sparse_check", target, blocks, kThreads, sparse_check, v, flags);
    if (error == 0) error = launch("sparse_apply", target, blocks < 1 ? 1 : blocks, kThreads, sparse_apply, v, flags);
    return error;
}

}  // namespace cuda
}  // namespace pse
