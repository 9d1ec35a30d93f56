// 3 of topm.cu (and 1, over the sample): the entry of one rank among pairs (key, index), and what follows from it.
#pragma once
#include "cuda/topm_sample.cuh"

namespace pse {
namespace cuda {

constexpr int kSmall = 512;  // so few are ranked by comparing all with all

template <class Key>
struct Range {
    bool by_index;
    Key key;  // by_index: of the one key that is left
    int64_t low, high;

    // Descending key is ascending complement. -1: outside.
    PSE_HD int64_t place(Key k, int64_t i) const {
        const int64_t value = by_index ? i : int64_t(KeyTraits<Key>::none) - int64_t(k);
        const bool inside = value >= low && value <= high && (!by_index || k == key);
        return inside ? value - low : -1;
    }
};

// `samples`: A and B of each sampled group over its sample, else the candidates. Each problem has `share` blocks.
template <class Key>
PSE_KERNEL(kThreads)
topm_narrow(View<Key> v, int64_t samples, int64_t share) {
    PSE_SHARED(uint32_t, bins, kBins);
    PSE_SHARED(int64_t, sums, kWarps);
    PSE_SHARED(Key, keys, kSmall);
    PSE_SHARED(int64_t, indices, kSmall);
    const int64_t slice = block() % share, q = block() / share;
    const int64_t p = samples != 0 ? q / 2 * kProblems + q % 2 : q * kProblems + 2;
    const Global<int64_t> problem = v.problems + p * kProblemWords;
    const int64_t done = load(problem, kDone);
    if (done != 0) return;
    const int64_t by_index = load(problem, kByIndex), key = load(problem, kFoundKey);
    const int64_t low = load(problem, kLow), high = load(problem, kHigh);
    const int64_t rank = load(problem, kRank), count = load(problem, kCount), g = load(problem, kOfGroup);
    const Range<Key> range = {by_index != 0, Key(key), low, high};
    const Global<Key> from_keys = samples != 0 ? v.sample_keys : v.pool_keys;
    const Global<int64_t> from_indices = samples != 0 ? v.sample_indices : v.pool_indices;
    const int64_t first = load(v.group(g), samples != 0 ? kSampleFirst : kPoolFirst);
    const int64_t n = samples != 0 ? load(v.group(g), kSamples) : load(v.state_of(g), kWithin);
    const int64_t begin = n * slice / share, end = n * (slice + 1) / share;

    if (count <= kSmall) {
        const Global<Key> small_keys = v.small_keys + p * kSmall;
        const Global<int64_t> small_indices = v.small_indices + p * kSmall;
        for (int64_t i = begin + thread(); i < end; i += kThreads) {
            const Key k = without_sign(load(from_keys, first + i));
            const int64_t index = load(from_indices, first + i);
            if (range.place(k, index) < 0) continue;
            const int64_t slot = atomic_add(problem, kCollected, int64_t(1));
            store(small_keys, slot, k);
            store(small_indices, slot, index);
        }
        if (!last_block(v.tickets, 1 + p, uint32_t(share))) return;
        for (int i = thread(); i < int(count); i += kThreads) {
            store(keys, i, load(small_keys, i));
            store(indices, i, load(small_indices, i));
        }
        sync_block();
        for (int i = thread(); i < int(count); i += kThreads) {
            const Bound<Key> mine = {load(keys, i), load(indices, i)};
            int64_t place = 1;  // samples may repeat: equal pairs count in the order of their slots
            for (int j = 0; j < int(count); ++j) {
                const Key k = load(keys, j);
                const int64_t index = load(indices, j);
                const bool equal = k == mine.key && index == mine.index;
                place += equal ? j < i : mine.holds(k, index);
            }
            if (place != rank) continue;
            put_bound(problem, kFoundKey, mine);
            store(problem, kDone, int64_t(1));
        }
        return;
    }

    int shift = 0;
    while (((high - low) >> shift) >= kBins) ++shift;
    for (int b = thread(); b < kBins; b += kThreads) store(bins, b, 0u);
    sync_block();
    for (int64_t i = begin + thread(); i < end; i += kThreads) {
        const Key k = without_sign(load(from_keys, first + i));
        const int64_t place = range.place(k, load(from_indices, first + i));
        if (place >= 0) atomic_add(bins, int(place >> shift), 1u);
    }
    sync_block();
    const Global<int64_t> histogram = v.problem_histogram + p * kBins;
    for (int b = thread(); b < kBins; b += kThreads) {
        const uint32_t found = load(bins, b);
        if (found != 0) atomic_add(histogram, b, int64_t(found));
    }
    if (!last_block(v.tickets, 1 + p, uint32_t(share))) return;
    int64_t mine[kBinsPer], sum = 0, total;
    for (int j = 0; j < kBinsPer; ++j) {
        mine[j] = load(histogram, thread() * kBinsPer + j);
        store(histogram, thread() * kBinsPer + j, int64_t(0));
        sum += mine[j];
    }
    int64_t before = scan_block(sums, sum, &total);
    for (int j = 0; j < kBinsPer; ++j) {
        if (before < rank && rank <= before + mine[j]) {
            const int64_t from = low + (int64_t(thread() * kBinsPer + j) << shift);
            const int64_t last = from + ((int64_t(1) << shift) - 1);
            const int64_t to = last < high ? last : high;
            store(problem, kRank, rank - before);
            store(problem, kCount, mine[j]);
            store(problem, kLow, from);
            store(problem, kHigh, to);
            if (from == to && by_index != 0) {
                store(problem, kFoundIndex, from);
                store(problem, kDone, int64_t(1));
            } else if (from == to) {
                store(problem, kFoundKey, int64_t(KeyTraits<Key>::none) - from);
                store(problem, kByIndex, int64_t(1));
                store(problem, kLow, int64_t(0));
                store(problem, kHigh, load(v.group(g), kSize) - 1);
            }
        }
        before += mine[j];
    }
}

// Before 2: the bracket of every sampled group, as found or as a test wants it.
template <class Key>
PSE_KERNEL(kThreads)
topm_bracket(View<Key> v, int hooks) {
    const int64_t g = block() * kThreads + thread();
    if (g >= v.num_groups) return;
    const int64_t p = load(v.group(g), kProblem);
    if (p < 0) return;
    Bound<Key> a = bound_at<Key>(v.problems + p * kProblemWords, kFoundKey);
    Bound<Key> b = bound_at<Key>(v.problems + (p + 1) * kProblemWords, kFoundKey);
    if (v.one_pass != 0 && a.key == 0) a = nothing<Key>();  // the score of the last one edited must be known
    if (hooks & kHookTooFew) b = a;
    if (hooks & kHookTooMany) a = b = everything<Key>();
    put_bound(v.state_of(g), kAKey, a);
    put_bound(v.state_of(g), kBKey, b);
}

// ---- 4 with one_pass: the chosen candidates are edited. Without: they are counted for a record. K and the thresholds.

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
    const Global<T> params = simt::global<T>(t.params, t.numel);
    T x = load(params, local);
    Real before, after;
    widen(x, &before);
    round_to(sub_rn(before, mul_rn(scale, delta)), &x);
    widen(x, &after);
    store(params, local, x);
    return before == after ? 1 : 0;
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

template <class Key>
PSE_KERNEL(kThreads)
topm_close_pool(View<Key> v, int64_t share) {
    const int64_t slice = block() % share, p = block() / share * kProblems + 2;
    const Global<int64_t> problem = v.problems + p * kProblemWords;
    const int64_t g = load(problem, kOfGroup);
    const Global<int64_t> state = v.state_of(g);
    const int64_t path = load(state, kPath);
    if (path == kSettled && slice == 0) {
        const Bound<Key> k = bound_at<Key>(state, kKKey);
        if (k.key != nothing<Key>().key) put_thresholds(v, g, k.key);
    }
    if (path != kPool) return;
    const Bound<Key> k = bound_at<Key>(problem, kFoundKey);
    if (slice == 0) {
        put_thresholds(v, g, k.key);
        if (thread() == 0) put_bound(state, kKKey, k);
    }
    if (v.one_pass == 0 && v.ordered == 0) return;
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
