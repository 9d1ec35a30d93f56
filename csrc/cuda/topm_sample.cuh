// 0 and 1 of topm.cu: outputs and state are opened, positions are drawn.
#pragma once
#include "core/philox.h"
#include "cuda/topm_view.cuh"

namespace pse {
namespace cuda {

constexpr uint64_t kSampleSeed = 0x70736574'6f706d31u;  // the CPU's

// ---- 0 open: outputs and state, so that scratch and outputs may hold anything before

template <class Key>
PSE_KERNEL(kThreads)
topm_open(View<Key> v) {
    const int64_t i = block() * kThreads + thread();
    if (i < v.num_tensors) {
        put_threshold(v, i, double(bits_float(0x7f800000u)));
        store(v.kept, i, int64_t(0));
        store(v.unchanged, i, int64_t(0));
        store(v.nonfinite, i, int64_t(0));
    }
    if (i >= v.num_groups) return;
    const Global<int64_t> state = v.state_of(i);
    for (int word = 0; word < kStateWords; ++word) store(state, word, int64_t(0));
    put_bound(state, kKKey, nothing<Key>());
    store(state, kTieChunk, int64_t(-1));
    const int64_t m = load(v.group(i), kM), problem = load(v.group(i), kProblem);
    store(state, kPath, int64_t(m == 0 ? kSettled : problem < 0 ? kExact : kBracket));
    for (int64_t p = problem; problem >= 0 && p < problem + kProblems; ++p) {
        store(v.problems, p * kProblemWords + kOfGroup, i);
        store(v.problems, p * kProblemWords + kDone, int64_t(1));
    }
}

// ---- 1 sample

template <class Key>
PSE_DEVICE Key key_of_entry(const TensorRow& t, int64_t local) {
    Eight<Key> key;
    if constexpr (sizeof(Key) == 8) {
        if (t.in_double()) {
            using Source = Mixed<double, Key>;
            typename Source::Raw raw;
            Eight<double> delta;
            load_raw(Ragged{}, Source{}, t, local, 1, &raw);
            keys_of(Ragged{}, Source{}, t, local, 1, raw, &delta, &key);
            return key.at[0];
        }
    }
    using Source = Mixed<float, Key>;
    typename Source::Raw raw;
    Eight<float> delta;
    load_raw(Ragged{}, Source{}, t, local, 1, &raw);
    keys_of(Ragged{}, Source{}, t, local, 1, raw, &delta, &key);
    return key.at[0];
}

template <class Key>
PSE_DEVICE void open_problem(const View<Key>& v, int64_t p, int64_t rank, int64_t count) {
    const Global<int64_t> problem = v.problems + p * kProblemWords;
    if (rank < 1 || rank > count) {
        put_bound(problem, kFoundKey, rank < 1 ? nothing<Key>() : everything<Key>());
        return;
    }
    store(problem, kDone, int64_t(0));
    store(problem, kByIndex, int64_t(0));
    store(problem, kLow, int64_t(1));
    store(problem, kHigh, int64_t(KeyTraits<Key>::none - 1));  // the complement of key 1; empty slots are above
    store(problem, kRank, rank);
    store(problem, kCount, count);
}

// Positions are drawn with replacement. The last block opens the problems A and B.
template <class Key>
PSE_KERNEL(kThreads)
topm_sample(View<Key> v) {
    const int64_t i = block() * kThreads + thread();
    const int64_t g = find_row(v.groups, kGroupWords, kSampleFirst, v.num_groups, i);  // samples are whole blocks
    const int64_t draw = i - load(v.group(g), kSampleFirst), size = load(v.group(g), kSize);
    const int64_t index =
        int64_t(baseline::mulhi64(baseline::philox_u64(kSampleSeed, uint64_t(draw), 0), uint64_t(size)));
    const int64_t tensor = v.per_tensor != 0 ? g : find_row(v.table, kTensorWords, kFirst, v.num_tensors, index);
    const TensorRow t = tensor_row(v.table, tensor);
    const Key key = key_of_entry<Key>(t, v.per_tensor != 0 ? index : index - t.first);
    store(v.sample_keys, i, key);
    store(v.sample_indices, i, index);
    add_count(v.problems, load(v.group(g), kProblem) * kProblemWords + kCount, key != 0 ? 1 : 0);
    if (!last_block(v.tickets, 0, uint32_t(blocks()))) return;
    for (int64_t h = thread(); h < v.num_groups; h += kThreads) {
        const int64_t p = load(v.group(h), kProblem);
        if (p < 0) continue;
        const int64_t eligible = load(v.problems, p * kProblemWords + kCount);
        open_problem(v, p, load(v.group(h), kRankA), eligible);
        open_problem(v, p + 1, load(v.group(h), kRankB), eligible);
    }
}

}  // namespace cuda
}  // namespace pse
