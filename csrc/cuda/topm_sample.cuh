// 0 and 1 of topm.cu: scratch and outputs are opened, positions are drawn, A and B are found among them.
#pragma once
#include "core/philox.h"
#include "cuda/topm_rank.cuh"

namespace pse {
namespace cuda {

constexpr uint64_t kSampleSeed = 0x70736574'6f706d31u;  // the CPU's

// ---- 0 open, so that scratch and outputs may hold anything before. `words`: the end of the tables, from word `first`
// on; what comes before is in its place. `zeros`: histograms and tickets.

template <class Key>
PSE_KERNEL(kThreads)
topm_open(View<Key> v, Global<int64_t> tables, Words words, int64_t first, int64_t count, Global<int64_t> zeros,
          int64_t num_zeros) {
    after_earlier_launches();
    const int64_t from = block() * kThreads + thread(), step = blocks() * kThreads;
    for (int64_t i = from; i < count; i += step) store(tables, first + i, words.at[i]);
    for (int64_t i = from; i < num_zeros; i += step) store(zeros, i, int64_t(0));
    for (int64_t i = from; i < v.num_tensors; i += step) {
        put_threshold(v, i, double(bits_float(0x7f800000u)));
        store(v.kept, i, int64_t(0));
        store(v.unchanged, i, int64_t(0));
        store(v.nonfinite, i, int64_t(0));
    }
    for (int64_t g = from; g < v.num_groups; g += step) {
        const auto word = [&](int which) {
            const int64_t at = v.num_tensors * kTensorWords + g * kGroupWords + which;
            return at < first ? load(tables, at) : words.at[at - first];
        };
        const int64_t m = word(kM), size = word(kSize), samples = word(kSamples);
        const bool exact = m > 0 && size > 0 && samples == 0;
        const Global<int64_t> state = v.state_of(g);
        for (int i = 0; i < kStateWords; ++i) store(state, i, int64_t(0));
        put_bound(state, kKKey, nothing<Key>());
        store(state, kTieChunk, int64_t(-1));
        store(state, kPath, int64_t(exact ? kExact : samples > 0 ? kBracket : kSettled));
        for (int which = 0; which < v.problems_each; ++which) {
            Problem<Key> x = any_key<Key>(m, size);
            x.open = exact && which == kK;
            put_problem(v.problem_of(g, which), x);
        }
    }
}

// ---- 1 sample

template <class Source>
PSE_DEVICE typename Source::Key key_of_entry_as(Source source, const TensorRow& t, int64_t local) {
    typename Source::Raw raw;
    typename Source::Entries entries;
    load_raw(Ragged{}, source, t, local, 1, &raw);
    entries_of(Ragged{}, source, t, local, 1, raw, &entries);
    return entries.key.at[0];
}
template <class Key>
PSE_DEVICE Key key_of_entry(const TensorRow& t, int64_t local) {
    if constexpr (sizeof(Key) == 8) {
        if (t.in_double()) return key_of_entry_as(Mixed<double, Key>{}, t, local);
    }
    return key_of_entry_as(Mixed<float, Key>{}, t, local);
}

// Positions are drawn with replacement, one a thread; a group's samples are whole blocks. A and B share the first
// digit, which is counted as the keys come; the group's last block keeps the part of either.
template <class Key>
PSE_KERNEL(kThreads)
topm_sample(View<Key> v) {
    after_earlier_launches();
    PSE_SHARED(uint32_t, bins, kBins);
    PSE_SHARED(int64_t, sums, kWarps);
    const int64_t i = block() * kThreads + thread();
    const int64_t g = find_row(v.groups, kGroupWords, kSampleFirst, v.num_groups, i);
    const int64_t draw = i - load(v.group(g), kSampleFirst), size = load(v.group(g), kSize);
    const int64_t samples = load(v.group(g), kSamples);
    const int64_t index =
        int64_t(baseline::mulhi64(baseline::philox_u64(kSampleSeed, uint64_t(draw), 0), uint64_t(size)));
    const int64_t tensor = v.per_tensor != 0 ? g : find_row(v.table, kTensorWords, kFirst, v.num_tensors, index);
    const TensorRow t = tensor_row(v.table, tensor);
    const Key key = key_of_entry<Key>(t, v.per_tensor != 0 ? index : index - t.first);
    store(v.sample_keys, i, key);
    store(v.sample_indices, i, index);

    const Problem<Key> all = any_key<Key>(0, 0);
    const int shift = all.shift();
    const int64_t place = all.place(key, index);
    clear_bins(bins, kBins);
    if (place >= 0) atomic_add(bins, int(place >> shift), 1u);
    const Global<int64_t> histogram = v.histogram_of(g, kA);
    add_bins(bins, 1, histogram);
    if (!last_block(v.tickets, v.problem(g, kA), uint32_t(samples / kThreads))) return;
    int64_t mine[kBinsPer], sum = 0, eligible;
    take_parts(histogram, mine);
    PSE_UNROLL
    for (int j = 0; j < kBinsPer; ++j) sum += mine[j];
    scan_block(sums, sum, &eligible);
    for (int which = kA; which <= kB; ++which) {
        const int64_t rank = load(v.group(g), which == kA ? kRankA : kRankB);
        // Before the first nothing is held, after the last everything; but one_pass must know the last score it edits.
        const bool none = rank < 1 || (rank > eligible && which == kA && v.one_pass != 0);
        if (none || rank > eligible) {
            if (thread() == 0) close_problem(v, g, which, none ? nothing<Key>() : everything<Key>());
        } else {
            keep_part(v, g, which, any_key<Key>(rank, eligible), mine, sums);
        }
    }
}

// The rest of both: a digit, or all that is left. Each of the two has `share` blocks.
template <class Key, bool kFinish>
PSE_KERNEL(kThreads, kAnyOccupancy)
topm_bracket(View<Key> v, int64_t share) {
    after_earlier_launches();
    PSE_RANK_ROOM(Key, room, 1);
    const int64_t slice = block() % share, g = block() / share / 2;
    const int which = block() / share % 2 == 0 ? kA : kB;
    const int64_t samples = load(v.group(g), kSamples), first = load(v.group(g), kSampleFirst);
    if (samples == 0) return;
    const Pairs<Key> sample = {v.sample_keys + first, v.sample_indices + first, samples};
    if constexpr (kFinish)
        finish(v, g, which, sample, slice, share, room);
    else
        narrow(v, g, which, sample, slice, share, room);
}

}  // namespace cuda
}  // namespace pse
