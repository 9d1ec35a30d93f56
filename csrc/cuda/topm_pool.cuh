// 4 of topm.cu, for groups whose candidates are settled. Where a record or a list is wanted, the chosen candidates are
// counted for it, and marked for topm_record. Else, with one_pass, they are edited.
#pragma once
#include "cuda/topm_view.cuh"

namespace pse {
namespace cuda {

template <class Real>
PSE_DEVICE Real delta_of(const TensorRow& t, int64_t i) {
    Eight<Real> base, tuned;
    load_any(Ragged{}, t.tag(1), t.base, t.numel, i, 1, &base);
    load_any(Ragged{}, t.tag(2), t.tuned, t.numel, i, 1, &tuned);
    return sub_rn(tuned.at[0], base.at[0]);
}
template <class Key, class Keep>
PSE_DEVICE int edit_chosen(const TensorRow& t, int64_t i, double scale, const Keep& keep) {
    if constexpr (sizeof(Key) == 8) {
        if (t.in_double()) return edit_one(t, i, delta_of<double>(t, i), scale, keep);
    }
    return edit_one(t, i, delta_of<float>(t, i), float(scale), keep);
}
// By its key alone, where that is the delta.
template <class Key>
PSE_DEVICE int edit_candidate(const TensorRow& t, int64_t i, Key signed_key, double scale) {
    if (t.tag(3) != kNoImportance) return edit_chosen<Key>(t, i, scale, KeepNothing{});
    const double delta = signed_score(signed_key);
    if constexpr (sizeof(Key) == 8) {
        if (t.in_double()) return edit_one(t, i, delta, scale, KeepNothing{});
    }
    return edit_one(t, i, float(delta), float(scale), KeepNothing{});
}

// By `share` blocks of which this is one.
template <class Key>
PSE_DEVICE void close_pool(const View<Key>& v, int64_t g, int64_t slice, int64_t share) {
    if (v.one_pass == 0 && v.ordered == 0) return;
    const Global<int64_t> state = v.state_of(g);
    const Bound<Key> k = bound_at<Key>(state, kKKey);
    const int64_t n = load(state, kWithin), first = load(v.group(g), kPoolFirst);
    const int64_t begin = n * slice / share, end = n * (slice + 1) / share;
    for (int64_t i = begin; i < end; i += kThreads) {  // whole warps, for the sums
        const bool inside = i + thread() < end;
        const Key signed_key = inside ? load(v.pool_keys, first + i + thread()) : Key(0);
        const int64_t index = inside ? load(v.pool_indices, first + i + thread()) : 0;
        const bool chosen = inside && k.holds(without_sign(signed_key), index);
        if (ballot(chosen) == 0) continue;
        const int64_t tensor = v.per_tensor != 0 ? g : find_row(v.table, kTensorWords, kFirst, v.num_tensors, index);
        const TensorRow t = tensor_row(v.table, tensor);
        const int64_t local = v.per_tensor != 0 ? index : index - t.first;
        if (v.ordered != 0) {
            if (chosen) atomic_add(v.greater, t.first_chunk + local / v.chunk, int32_t(1));
            if (chosen && v.journaled()) set_bit(v.chosen, row_of(t, tensor, local), int(local % kRow));
            continue;
        }
        int same = 0;
        if (chosen) same = edit_candidate(t, local, signed_key, v.scale);
        // Candidates of a chunk lie together, so a warp's are nearly always of one tensor.
        const int64_t leader = shuffle(tensor, 0);
        if (ballot(tensor == leader || !chosen) == kAllLanes) {
            add_count(v.kept, leader, chosen ? 1 : 0);
            add_count(v.unchanged, leader, same);
        } else if (chosen) {
            atomic_add(v.kept, tensor, int64_t(1));
            if (same != 0) atomic_add(v.unchanged, tensor, int64_t(1));
        }
    }
}

}  // namespace cuda
}  // namespace pse
