// What the kernels of a top-m edit share: the words that say how far each group is, the pointers, the chunks.
//
// Group    Entries that compete for the same m. What is still to be done for it is its path.
// Problem  To find the entry of one rank: A and B of a sampled group in its sample, K among candidates or everything.
#pragma once
#include "cpu/topm.h"
#include "cuda/topm_entries.cuh"

namespace pse {
namespace cuda {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPer = kBins / kThreads;
constexpr int kRow = kWarp * kPer;  // neighbours that a warp has in a step
constexpr int kRowWords = kRow / 32;
constexpr int kLargestChunk = 1 << 14;  // a multiple of rows

// What is still to be done for a group.
enum Path : int64_t {
    kBracket,  // 2 is ahead
    kPool,     // 3 is ahead, over the candidates
    kExact,    // 3 is ahead, over everything
    kRest,     // 3 is ahead, over what A does not hold: that has been edited
    kSettled,  // K is known
    kSpoilt
};
enum StateWord {
    kPath,
    kKKey,  // the places that the problems are to find, in their order
    kKIndex,
    kAKey,
    kAIndex,
    kBKey,
    kBIndex,
    kAbove,      // sweep: held by A
    kWithin,     // sweep: candidates, whether or not there was room
    kExcluded,   // may not be selected
    kTieChunk,   // entries of key K count before this chunk,
    kTieTaken,   // so many of them in it, none after
    kSwept,      // kExcluded is complete
    kJournaled,  // entries that have a place in the journal
    kStateWords
};
enum GroupWord {
    kM,
    kSize,
    kSamples,  // 0: not sampled
    kSampleFirst,
    kRankA,
    kRankB,
    kPoolFirst,
    kPoolCapacity,
    kListFirst,
    kGroupTensor,
    kGroupTensors,
    kGroupFirst,
    kGroupChunk,
    kGroupChunks,
    kJournalFirst,
    kGroupWords
};
// Which place a problem is to find.
enum Which { kK, kA, kB, kProblems };
// How far it is: the rank-th of `count` in a range of complemented keys, then of indices of the one key that is left.
enum ProblemWord { kOpen, kByIndex, kKey, kLow, kHigh, kRank, kCount, kCollected, kProblemWords };

// A candidate's key carries the sign of its delta in the spare top bit: with the key it is the delta again, where there
// is no importance, and base and tuned need not be fetched a second time.
template <class Key>
PSE_HD Key without_sign(Key key) {
    return Key(key & KeyTraits<Key>::none);
}
template <class Key>
PSE_HD double signed_score(Key key) {
    const double score = key_score(without_sign(key));
    return key >> KeyTraits<Key>::bits != 0 ? -score : score;
}

template <class K>
struct View {
    using Key = K;
    Global<const int64_t> table, groups;
    Global<int64_t> state, problems, histogram;  // the latter of each problem
    Global<uint32_t> tickets;                    // of each problem, then of whole launches
    Global<int32_t> greater, equal;              // per chunk: selected whatever the ties, and of key K
    Global<int64_t> tile_sums;
    // topm_journal.cuh: of every entry, of every row, of every edited entry.
    Global<uint32_t> chosen;
    Global<int64_t> marks;
    Global<uint8_t> journal_places;
    int64_t journal, journal_size;
    Global<K> sample_keys, pool_keys, list_keys;
    Global<int64_t> sample_indices, pool_indices, list_indices;
    Global<int64_t> kept, unchanged, nonfinite;
    int64_t threshold, indices, values, value_bytes, record;
    int64_t num_tensors, num_groups, num_chunks, chunk;
    int64_t problems_each;  // per group: kProblems, or K's alone where no group is sampled
    int64_t per_tensor, one_pass, ordered;
    double scale;
    float scale_f32;

    template <class Real>
    PSE_HD Real scale_as() const {
        return sizeof(Real) == 8 ? Real(scale) : Real(scale_f32);
    }
    PSE_HD bool journaled() const { return one_pass != 0 && ordered != 0; }
    PSE_HD Global<int64_t> state_of(int64_t g) const { return state + g * kStateWords; }
    PSE_HD Global<const int64_t> group(int64_t g) const { return groups + g * kGroupWords; }
    PSE_HD int64_t problem(int64_t g, int which) const { return g * problems_each + which; }
    PSE_HD Global<int64_t> problem_of(int64_t g, int which) const {
        return problems + problem(g, which) * kProblemWords;
    }
    PSE_HD Global<int64_t> histogram_of(int64_t g, int which) const { return histogram + problem(g, which) * kBins; }
    PSE_HD int64_t launch_ticket() const { return num_groups * problems_each; }
};

template <class M>
struct IsWide {
    static constexpr bool value = sizeof(typename M::Key) == 8;
};

// Calls body(source): in a call with 64-bit keys a tensor is computed in fp64 or in fp32.
template <class M, class Body>
PSE_DEVICE void with_source(M, const TensorRow& t, const Body& body) {
    if constexpr (IsWide<M>::value) {
        if (t.in_double())
            body(Mixed<double, uint64_t>{});
        else
            body(Mixed<float, uint64_t>{});
    } else {
        body(M{});
    }
}

template <class Key>
PSE_DEVICE Bound<Key> bound_at(Global<int64_t> words, int word) {
    const int64_t key = load(words, word), index = load(words, word + 1);
    return {Key(key), index};
}
template <class Key>
PSE_DEVICE void put_bound(Global<int64_t> words, int word, Bound<Key> bound) {
    store(words, word, int64_t(bound.key));
    store(words, word + 1, bound.index);
}

// One chunk: n entries of tensor t from `local` on; the first has this index in the group.
struct Part {
    int64_t tensor, group, local, index;
    int n;
};
template <class Key>
PSE_DEVICE Part part_of(const View<Key>& v, int64_t chunk, TensorRow* t) {
    const int64_t tensor = find_row(v.table, kTensorWords, kFirstChunk, v.num_tensors, chunk);
    *t = tensor_row(v.table, tensor);
    const int64_t local = (chunk - t->first_chunk) * v.chunk;
    const int64_t left = t->numel - local;
    return {tensor, v.per_tensor != 0 ? tensor : 0, local, local + (v.per_tensor != 0 ? 0 : t->first),
            int(left < v.chunk ? left : v.chunk)};
}
template <class Key>
PSE_DEVICE int64_t last_chunk_of(const View<Key>& v, int64_t g) {
    return load(v.group(g), kGroupChunk) + load(v.group(g), kGroupChunks) - 1;
}
// The row of an entry: every tensor begins a new one, so that a chunk, a multiple of kRow, has whole ones.
PSE_DEVICE int64_t row_of(const TensorRow& t, int64_t tensor, int64_t local) {
    return t.first / kRow + tensor + local / kRow;
}
PSE_DEVICE void set_bit(Global<uint32_t> words, int64_t row, int place) {
    atomic_or(words, row * kRowWords + place / 32, 1u << (place % 32));
}
// A row's part of the journal, in one word.
PSE_HD int64_t mark_of(int64_t slot, int entries) { return slot << 9 | entries; }
PSE_HD int64_t slot_of_mark(int64_t mark) { return mark >> 9; }
PSE_HD int entries_of_mark(int64_t mark) { return int(mark & 511); }

template <class Key>
PSE_DEVICE void put_threshold(const View<Key>& v, int64_t tensor, double score) {
    if constexpr (sizeof(Key) == 8)
        store(simt::global<double>(v.threshold, v.num_tensors), tensor, score);
    else
        store(simt::global<float>(v.threshold, v.num_tensors), tensor, float(score));
}
// The score of the last selected for all tensors of a group; a whole block calls.
template <class Key>
PSE_DEVICE void put_thresholds(const View<Key>& v, int64_t g, Key key) {
    const int64_t first = load(v.group(g), kGroupTensor), count = load(v.group(g), kGroupTensors);
    for (int64_t i = thread(); i < count; i += kThreads) put_threshold(v, first + i, key_score(key));
}

}  // namespace cuda
}  // namespace pse
