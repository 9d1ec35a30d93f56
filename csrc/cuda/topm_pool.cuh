// 4 of topm.cu, for groups whose candidates are settled. one_pass: the chosen candidates are edited. Else, where a
// record is wanted, they are counted for it.
#pragma once
#include "cuda/topm_view.cuh"

namespace pse {
namespace cuda {

// Edits one candidate; returns 1 if it rounds to what it was. Lanes may come alone.
template <class T, class Real, class Key>
PSE_DEVICE int edit_candidate(const TensorRow& t, int64_t local, Key signed_key, Real scale) {
    Real delta = Real(signed_score(signed_key));
    if (t.tag(3) != kNoImportance) {
        Eight<Real> base, tuned;
        load_any(Ragged{}, t.tag(1), t.base, t.numel, local, 1, &base);
        load_any(Ragged{}, t.tag(2), t.tuned, t.numel, local, 1, &tuned);
        delta = sub_rn(tuned.at[0], base.at[0]);
    }
    return edit_entry(simt::global<T>(t.params, t.numel), local, delta, scale);
}
template <class Real, class Key>
PSE_DEVICE int edit_candidate_as(const TensorRow& t, int64_t local, Key signed_key, Real scale) {
    if (t.tag(0) == int(DType::f32)) return edit_candidate<float>(t, local, signed_key, scale);
    if (t.tag(0) == int(DType::f16)) return edit_candidate<f16_t>(t, local, signed_key, scale);
    if (t.tag(0) == int(DType::bf16)) return edit_candidate<bf16_t>(t, local, signed_key, scale);
    if constexpr (sizeof(Real) == 8) return edit_candidate<double>(t, local, signed_key, scale);
    return 0;
}
template <class Key>
PSE_DEVICE int edit_any_candidate(const TensorRow& t, int64_t local, Key signed_key, double scale) {
    if constexpr (sizeof(Key) == 8) {
        if (t.in_double()) return edit_candidate_as<double>(t, local, signed_key, scale);
    }
    return edit_candidate_as<float>(t, local, signed_key, float(scale));
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
        if (v.one_pass == 0) {
            if (chosen) atomic_add(v.greater, t.first_chunk + local / v.chunk, int32_t(1));
            continue;
        }
        int same = 0;
        if (chosen) same = edit_any_candidate(t, local, signed_key, v.scale);
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
