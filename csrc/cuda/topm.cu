// Subtract scale * (tuned - base) from params at the m entries of largest score, or list them.
//
// Bytes  one_pass: base, tuned, and the touched 32-byte sectors of params, loaded and stored: 7.2 B per bf16 element at
//        density 0.10, 4.6 at 0.01. Else base + tuned once more: the look does not edit.
// Floor  a dense read-read-write pass over base, tuned and params is 6 B per bf16 element.
// Order  (key descending, flat index ascending): no ties, so one result for every grid, chunk size and schedule, which
//        is that of csrc/cpu/topm.cpp.
// Story  1 sample positions -> two places A and B in the order that bracket the m-th entry
//        2 sweep: count what A holds (one_pass: edit it), collect what B holds beyond A: the candidates
//        3 settle the candidates: the exact place K of the m-th entry
//        4 edit (or list) what K holds; with one_pass only the chosen candidates are left to do
// Unlucky  Too many candidates, or too few: the exact select, 11 bits of the key a pass, over what A does not hold
//        (one_pass) or over everything. Its kernels are always launched and leave at once where nothing is left to do:
//        the host never learns, so the whole can be captured in a graph. More than m above A after one_pass has edited:
//        below 1e-30; nonfinite = -1 says that params are spoilt.
// Groups of up to 2^16 entries are not sampled: the exact select reads them from the L2 cache.
// Passes give each block one run of chunks, so that counters stay in registers until the tensor changes.
#include "cuda/topm.h"

#include <vector>

#include "core/philox.h"
#include "cpu/topm.h"
#include "cuda/topm_entries.cuh"

namespace pse {
namespace cuda {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPer = kBins / kThreads;
constexpr int kCopies = 4;                              // of the block's bins, two warps each: 32 KB, six blocks an SM
constexpr int kStage = 1024;                            // candidates that a block holds back: 2 % of a chunk is 330
constexpr int kSmall = 512;                             // so few are ranked by comparing all with all
constexpr int64_t kUnsampled = 1 << 16;                 // groups up to here are selected exactly at once
constexpr uint64_t kSampleSeed = 0x70736574'6f706d31u;  // the CPU's

// What is still to be done for a group.
enum Path : int64_t {
    kBracket,  // 2 is ahead
    kPool,     // 3 is ahead
    kExact,    // exact select over everything
    kRest,     // exact select over what A does not hold: that has been edited
    kSettled,  // K is known
    kSpoilt
};
enum StateWord {
    kPath,
    kAKey,
    kAIndex,
    kBKey,
    kBIndex,
    kKKey,  // K, once it is known
    kKIndex,
    kNeed,  // exact select: entries still to be found among the `left` whose high bits are the prefix's
    kLeft,
    kPrefix,
    kAbove,     // sweep: held by A
    kWithin,    // sweep: candidates, whether or not there was room
    kExcluded,  // may not be selected
    kTieChunk,  // entries of key K count before this chunk,
    kTieTaken,  // so many of them in it, none after
    kSwept,     // kExcluded is complete
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
    kProblem,  // of A; B and the candidates follow. -1: not sampled
    kGroupTensor,
    kGroupTensors,
    kGroupFirst,
    kGroupChunk,
    kGroupChunks,
    kGroupWords
};
// A problem: the entry of one rank among pairs (key, index). Its range is of complemented keys, then of indices of the
// one key that is left.
enum ProblemWord {
    kDone,
    kByIndex,
    kLow,
    kHigh,
    kRank,
    kCount,
    kFoundKey,
    kFoundIndex,
    kCollected,
    kOfGroup,
    kProblemWords
};
constexpr int kProblems = 3;  // per sampled group: A, B, the candidates

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
    Global<int64_t> state, histogram, problems, problem_histogram;
    Global<uint32_t> tickets;        // 0: whole launches; 1 + p: problem p
    Global<int32_t> greater, equal;  // per chunk: selected whatever the ties, and of key K
    Global<int64_t> tile_sums;
    Global<K> sample_keys, pool_keys, small_keys;
    Global<int64_t> sample_indices, pool_indices, small_indices;
    Global<int64_t> kept, unchanged, nonfinite;
    int64_t threshold, indices, values, value_bytes, record;
    int64_t num_tensors, num_groups, num_chunks, chunk;
    int64_t per_tensor, one_pass, ordered;
    double scale;

    PSE_HD Global<int64_t> state_of(int64_t g) const { return state + g * kStateWords; }
    PSE_HD Global<const int64_t> group(int64_t g) const { return groups + g * kGroupWords; }
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

// ---- 3 settle (and 1, the sample): one round narrows every open problem by 11 bits, or ends it where few are left

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

// ---- 2 sweep

// What the counts say about a group that has been swept.
template <class Key>
PSE_DEVICE void decide(const View<Key>& v, int64_t g) {
    const Global<int64_t> state = v.state_of(g);
    const Global<const int64_t> group = v.group(g);
    const int64_t available = load(group, kSize) - load(state, kExcluded), wanted = load(group, kM);
    const int64_t m = wanted < available ? wanted : available;
    const int64_t within = load(state, kWithin), need = m - load(state, kAbove);
    const Bound<Key> a = bound_at<Key>(state, kAKey), b = bound_at<Key>(state, kBKey);
    store(state, kSwept, int64_t(1));
    Path path = v.one_pass != 0 ? kRest : kExact;
    if (m == 0) {
        path = kSettled;  // K stays as it was opened: nothing
    } else if (need == 0 && a.key != 0) {
        path = kSettled;
        put_bound(state, kKKey, a);
    } else if (need > 0 && need <= within && within <= load(group, kPoolCapacity)) {
        path = kPool;
        const int64_t p = load(group, kProblem) + 2;
        open_problem(v, p, need, within);
        store(v.problems, p * kProblemWords + kLow, int64_t(KeyTraits<Key>::none) - int64_t(a.key));
        if (b.key != 0) store(v.problems, p * kProblemWords + kHigh, int64_t(KeyTraits<Key>::none) - int64_t(b.key));
    } else if (need <= 0 && v.one_pass != 0) {
        path = kSpoilt;
        const int64_t first = load(group, kGroupTensor), count = load(group, kGroupTensors);
        for (int64_t i = first; i < first + count; ++i) store(v.nonfinite, i, int64_t(-1));
    }
    store(state, kPath, int64_t(path));
}

template <class M, bool kEdit>
PSE_KERNEL(kThreads)
topm_sweep(View<typename M::Key> v) {
    using Key = typename M::Key;
    PSE_SHARED(Key, stage_keys, kStage);
    PSE_SHARED(int64_t, stage_indices, kStage);
    PSE_SHARED(uint32_t, staged, 1);
    PSE_SHARED(int64_t, slot, 1);
    PSE_SHARED(int, sums, kWarps);
    if (thread() == 0) store(staged, 0, 0u);
    sync_block();
    int64_t current = -1;
    int above_count = 0, unchanged = 0, excluded = 0;  // of one thread: enough for 2^39 entries
    const auto flush = [&] {
        if (current < 0) return;
        const int64_t g = v.per_tensor != 0 ? current : 0;
        add_count(v.state, g * kStateWords + kAbove, above_count);
        add_count(v.state, g * kStateWords + kExcluded, excluded);
        add_count(v.nonfinite, current, excluded);
        if (kEdit) add_count(v.kept, current, above_count);
        if (kEdit) add_count(v.unchanged, current, unchanged);
        above_count = unchanged = excluded = 0;
    };
    const int64_t end = v.num_chunks * (block() + 1) / blocks();
    for (int64_t c = v.num_chunks * block() / blocks(); c < end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        if (part.tensor != current) {
            flush();
            current = part.tensor;
        }
        const Global<int64_t> state = v.state_of(part.group);
        const int64_t path = load(state, kPath);
        if (path != kBracket) continue;
        const Edge<Key> a = edge_of(bound_at<Key>(state, kAKey), part.index);
        const Edge<Key> b = edge_of(bound_at<Key>(state, kBKey), part.index);
        const int64_t pool = load(v.group(part.group), kPoolFirst), room = load(v.group(part.group), kPoolCapacity);
        int above_here = 0;
        with_source(M{}, t, [&](auto source) {
            for_each_step(
                source, t, part.local, part.n,
                [&]([[maybe_unused]] auto how, int at, int, int none, const auto& delta, const Eight<Key>& key) {
                    excluded += none;
                    const uint32_t above = held(key, a, at);
                    const uint32_t band = held(key, b, at) & ~above;
                    above_here += count_bits(above);
                    if constexpr (kEdit) {
                        if (ballot(above != 0) != 0)
                            unchanged += edit_eight(how, source, t, part.local + at, above, delta, v.scale);
                    }
                    if (ballot(band != 0) == 0) return;
                    const int candidates = count_bits(band);
                    int inclusive = candidates;
                    for (int by = 1; by < kWarp; by *= 2) {
                        const int other = shuffle_up(inclusive, by);
                        if (lane() >= by) inclusive += other;
                    }
                    uint32_t base = 0;
                    if (lane() == kWarp - 1) base = atomic_add(staged, 0, uint32_t(inclusive));
                    uint32_t place = shuffle(base, kWarp - 1) + uint32_t(inclusive - candidates);
                    PSE_UNROLL
                    for (int j = 0; j < kPer; ++j) {
                        if (((band >> j) & 1u) == 0) continue;
                        if (place < kStage) {
                            store(stage_keys, int(place), signed_key(source, delta.at[j], key.at[j]));
                            store(stage_indices, int(place), part.index + at + j);
                        } else {  // a chunk full of candidates
                            const int64_t free = atomic_add(state, kWithin, int64_t(1));
                            if (free < room)
                                store(v.pool_keys, pool + free, signed_key(source, delta.at[j], key.at[j]));
                            if (free < room) store(v.pool_indices, pool + free, part.index + at + j);
                        }
                        ++place;
                    }
                });
        });
        above_count += above_here;
        sync_block();
        const uint32_t all = load(staged, 0);
        const int full = int(all < kStage ? all : kStage);
        sync_block();
        if (full > 0) {
            if (thread() == 0) {
                store(staged, 0, 0u);
                store(slot, 0, atomic_add(state, kWithin, int64_t(full)));
            }
            sync_block();
            const int64_t free = load(slot, 0);
            for (int i = thread(); i < full; i += kThreads) {
                if (free + i >= room) continue;
                store(v.pool_keys, pool + free + i, load(stage_keys, i));
                store(v.pool_indices, pool + free + i, load(stage_indices, i));
            }
            sync_block();  // before the stage fills again
        }
        if (v.ordered != 0) {
            int total;
            scan_block(sums, above_here, &total);
            if (thread() == 0) store(v.greater, c, total);
        }
    }
    flush();
    if (!last_block(v.tickets, 0, uint32_t(blocks()))) return;
    for (int64_t g = thread(); g < v.num_groups; g += kThreads) {
        const int64_t path = load(v.state_of(g), kPath);
        if (path == kBracket) decide(v, g);
    }
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

// ---- the exact select

template <class Key>
PSE_HD int digit_shift(int round) {
    const int shift = KeyTraits<Key>::bits - kDigitBits * (round + 1);
    return shift < 0 ? 0 : shift;
}
template <class Key>
constexpr int kRounds = (KeyTraits<Key>::bits + kDigitBits - 1) / kDigitBits;

PSE_DEVICE bool is_exact(int64_t path) { return path == kExact || path == kRest; }

// Adds the digit below the settled bits of every eligible key. Entries without a delta (key 1: six of seven where a
// checkpoint was barely tuned) would fight over one bin: they are left out, and settle knows how many they are.
template <class M>
PSE_KERNEL(kThreads)
topm_count_digits(View<typename M::Key> v, int round) {
    using Key = typename M::Key;
    PSE_SHARED(uint32_t, bins, kCopies* kBins);
    const int shift = digit_shift<Key>(round);
    const Key span = Key(1) << (round == 0 ? KeyTraits<Key>::bits : digit_shift<Key>(round - 1));
    const int copy = warp() % kCopies * kBins;
    int64_t tensor = -1;
    int excluded = 0;
    const auto flush = [&](bool group_ends) {
        if (tensor < 0) return;
        const int64_t group = v.per_tensor != 0 ? tensor : 0;
        add_count(v.nonfinite, tensor, excluded);
        add_count(v.state, group * kStateWords + kExcluded, excluded);
        excluded = 0;
        if (!group_ends) return;
        sync_block();
        for (int b = thread(); b < kBins; b += kThreads) {
            uint32_t sum = 0;
            for (int each = 0; each < kCopies; ++each) sum += load(bins, each * kBins + b);
            if (sum != 0) atomic_add(v.histogram, group * kBins + b, int64_t(sum));
        }
        sync_block();
    };
    const int64_t end = v.num_chunks * (block() + 1) / blocks();
    for (int64_t c = v.num_chunks * block() / blocks(); c < end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        const Global<int64_t> state = v.state_of(part.group);
        const int64_t path = load(state, kPath), swept = load(state, kSwept);
        if (!is_exact(path)) continue;
        if (part.tensor != tensor) {
            flush(v.per_tensor != 0);
            if (tensor < 0 || v.per_tensor != 0) {
                for (int b = thread(); b < kCopies * kBins; b += kThreads) store(bins, b, 0u);
                sync_block();
            }
            tensor = part.tensor;
        }
        const Key prefix = Key(load(state, kPrefix));
        const Edge<Key> done = edge_of(path == kRest ? bound_at<Key>(state, kAKey) : nothing<Key>(), part.index);
        const bool counts = round == 0 && swept == 0;
        with_source(M{}, t, [&](auto source) {
            for_each_step(source, t, part.local, part.n,
                          [&](auto, int at, int, int none, const auto&, const Eight<Key>& key) {
                              if (counts) excluded += none;
                              const uint32_t left_out = held(key, done, at);
                              int bin = 0;
                              uint32_t run = 0;  // equal neighbours are counted at once
                              PSE_UNROLL
                              for (int j = 0; j < kPer; ++j) {
                                  const Key below = Key(key.at[j] - prefix);  // the bits that are not settled
                                  const bool counted = key.at[j] > 1 && ((left_out >> j) & 1u) == 0 && below < span;
                                  const int digit = int(below >> shift);
                                  if (counted && digit != bin && run != 0) {
                                      atomic_add(bins, copy + bin, run);
                                      run = 0;
                                  }
                                  bin = counted ? digit : bin;
                                  run += counted ? 1u : 0u;
                              }
                              if (run != 0) atomic_add(bins, copy + bin, run);
                          });
        });
    }
    flush(true);
}

// A block per group: one more digit of K's key.
template <class Key>
PSE_KERNEL(kThreads)
topm_settle_digit(View<Key> v, int round) {
    PSE_SHARED(int64_t, sums, kWarps);
    const int64_t g = block();
    const Global<int64_t> state = v.state_of(g);
    const int64_t path = load(state, kPath);
    if (!is_exact(path)) return;
    const int shift = digit_shift<Key>(round);
    int64_t need = load(state, kNeed), left = load(state, kLeft);
    const int64_t prefix = load(state, kPrefix);
    if (round == 0) {
        const int64_t available = load(v.group(g), kSize) - load(state, kExcluded), m = load(v.group(g), kM);
        const int64_t done = path == kRest ? load(state, kAbove) : 0;
        need = (m < available ? m : available) - done;
        left = available - done;
    }
    const Global<int64_t> histogram = v.histogram + g * kBins;
    const int first = kBins - 1 - thread() * kBinsPer;  // the largest digit first
    int64_t mine[kBinsPer], sum = 0, counted, total;
    for (int j = 0; j < kBinsPer; ++j) {
        mine[j] = load(histogram, first - j);
        store(histogram, first - j, int64_t(0));
        sum += mine[j];
    }
    scan_block(sums, sum, &counted);
    const int hot = int(Key(1) >> shift) & (kBins - 1);
    for (int j = 0; j < kBinsPer; ++j) {
        if (first - j != hot) continue;
        mine[j] += left - counted;
        sum += left - counted;
    }
    int64_t before = scan_block(sums, sum, &total);
    if (need <= 0) {
        if (thread() == 0) store(state, kPath, int64_t(kSettled));  // nothing is eligible: K stays nothing
        return;
    }
    for (int j = 0; j < kBinsPer; ++j) {
        if (before < need && need <= before + mine[j]) {
            store(state, kNeed, need - before);
            store(state, kLeft, mine[j]);
            store(state, kPrefix, prefix | (int64_t(first - j) << shift));
        }
        before += mine[j];
    }
}

// How many entries of each chunk have K's key, and how many a larger one.
template <class M>
PSE_KERNEL(kThreads)
topm_count_ties(View<typename M::Key> v) {
    using Key = typename M::Key;
    PSE_SHARED(int64_t, sums, kWarps);
    const int64_t end = v.num_chunks * (block() + 1) / blocks();
    for (int64_t c = v.num_chunks * block() / blocks(); c < end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        const Global<int64_t> state = v.state_of(part.group);
        const int64_t path = load(state, kPath), need = load(state, kNeed), left = load(state, kLeft);
        if (!is_exact(path) || (v.ordered == 0 && need == left)) continue;
        const Key wanted = Key(load(state, kPrefix));
        const Edge<Key> done = edge_of(path == kRest ? bound_at<Key>(state, kAKey) : nothing<Key>(), part.index);
        int64_t both = 0;  // ties in the low half, larger keys in the high half
        with_source(M{}, t, [&](auto source) {
            for_each_step(source, t, part.local, part.n,
                          [&](auto, int at, int, int, const auto&, const Eight<Key>& key) {
                              const uint32_t left_out = held(key, done, at);
                              PSE_UNROLL
                              for (int j = 0; j < kPer; ++j) {
                                  const bool tied = key.at[j] == wanted && ((left_out >> j) & 1u) == 0;
                                  both += tied ? 1 : key.at[j] > wanted ? int64_t(1) << 32 : 0;
                              }
                          });
        });
        int64_t total;
        scan_block(sums, both, &total);
        if (thread() == 0) {
            store(v.equal, c, int32_t(total & 0xffffffff));
            store(v.greater, c, int32_t(total >> 32));
        }
    }
}

// A block per group: K's index, the need-th of its key; and the thresholds.
template <class M>
PSE_KERNEL(kThreads)
topm_find_tie(View<typename M::Key> v) {
    using Key = typename M::Key;
    PSE_SHARED(int64_t, sums, kWarps);
    PSE_SHARED(int64_t, found, 2);  // chunk, ties before it
    const int64_t g = block();
    const Global<int64_t> state = v.state_of(g);
    const Global<const int64_t> group = v.group(g);
    const int64_t path = load(state, kPath);
    if (!is_exact(path)) return;
    const int64_t need = load(state, kNeed), left = load(state, kLeft), prefix = load(state, kPrefix);
    put_thresholds(v, g, Key(prefix));
    if (need == left) {
        if (thread() == 0) {
            put_bound(state, kKKey, Bound<Key>{Key(prefix), load(group, kSize) - 1});
            store(state, kTieChunk, v.num_chunks);
        }
        return;
    }
    const int64_t first = load(group, kGroupChunk), end = first + load(group, kGroupChunks);
    int64_t before = 0;
    for (int64_t tile = first; tile < end; tile += kStep) {
        int32_t mine[kPer];
        int64_t sum = 0, total;
        for (int j = 0; j < kPer; ++j) {
            const int64_t c = tile + thread() * kPer + j;
            mine[j] = c < end ? load(v.equal, c) : 0;
            sum += mine[j];
        }
        int64_t at = before + scan_block(sums, sum, &total);
        before += total;
        if (before < need) continue;
        for (int j = 0; j < kPer; ++j) {
            if (at < need && need <= at + mine[j]) {
                store(found, 0, tile + thread() * kPer + j);
                store(found, 1, at);
            }
            at += mine[j];
        }
        break;
    }
    sync_block();
    const int64_t c = load(found, 0), ties = need - load(found, 1);
    TensorRow t;
    const Part part = part_of(v, c, &t);
    const Edge<Key> done = edge_of(path == kRest ? bound_at<Key>(state, kAKey) : nothing<Key>(), part.index);
    with_source(M{}, t, [&](auto source) {
        int64_t seen = 0;
        for_each_step(source, t, part.local, part.n, [&](auto, int at, int, int, const auto&, const Eight<Key>& key) {
            const uint32_t left_out = held(key, done, at);
            uint32_t tied = 0;
            for (int j = 0; j < kPer; ++j) tied |= uint32_t(key.at[j] == Key(prefix) ? 1 : 0) << j;
            tied &= ~left_out;
            int64_t total;
            int64_t at_tie = seen + scan_block(sums, int64_t(count_bits(tied)), &total);
            seen += total;
            for (int j = 0; j < kPer; ++j) {
                if (((tied >> j) & 1u) == 0) continue;
                if (++at_tie != ties) continue;
                put_bound(state, kKKey, Bound<Key>{Key(prefix), part.index + at + j});
                store(state, kTieChunk, c);
                store(state, kTieTaken, ties);
            }
        });
    });
}

// ---- 4 edit or list what K holds

// For a record: where the entries of each chunk start, within a tile of kStep chunks, and where the tiles start.
template <class Key>
PSE_KERNEL(kThreads)
topm_scan_chunks(View<Key> v) {
    PSE_SHARED(int64_t, sums, kWarps);
    int64_t mine[kPer], sum = 0, total;
    for (int j = 0; j < kPer; ++j) {
        const int64_t c = block() * kStep + thread() * kPer + j;
        mine[j] = 0;
        if (c < v.num_chunks) {
            const int64_t g =
                v.per_tensor != 0 ? find_row(v.table, kTensorWords, kFirstChunk, v.num_tensors, c) : int64_t(0);
            const Global<int64_t> state = v.state_of(g);
            const Bound<Key> k = bound_at<Key>(state, kKKey);
            const int64_t tie_chunk = load(state, kTieChunk);
            if (k.key != nothing<Key>().key) {
                mine[j] = load(v.greater, c);
                if (c < tie_chunk) mine[j] += load(v.equal, c);
                if (c == tie_chunk) mine[j] += load(state, kTieTaken);
            }
        }
        sum += mine[j];
    }
    int64_t at = scan_block(sums, sum, &total);
    for (int j = 0; j < kPer; ++j) {
        const int64_t c = block() * kStep + thread() * kPer + j;
        if (c < v.num_chunks) store(v.greater, c, int32_t(at));
        at += mine[j];
    }
    if (thread() == 0) store(v.tile_sums, block(), total);
    if (!last_block(v.tickets, 0, uint32_t(blocks()))) return;
    int64_t before = 0;
    for (int64_t tile = 0; tile < blocks(); tile += kThreads) {
        const bool inside = tile + thread() < blocks();
        const int64_t here = inside ? load(v.tile_sums, tile + thread()) : 0;
        const int64_t start = before + scan_block(sums, here, &total);
        if (inside) store(v.tile_sums, tile + thread(), start);
        before += total;
    }
    if (thread() == 0) store(v.tile_sums, blocks(), before);
}

enum Output { kEditOnly, kEditRecord, kList };

template <class M, Output kOutput>
PSE_KERNEL(kThreads)
topm_apply(View<typename M::Key> v) {
    using Key = typename M::Key;
    PSE_SHARED(int32_t, sums, kWarps);
    int64_t current = -1;
    int kept = 0, unchanged = 0;
    const auto flush = [&] {
        if (current < 0) return;
        add_count(v.kept, current, kept);
        if (kOutput != kList) add_count(v.unchanged, current, unchanged);
        kept = unchanged = 0;
    };
    const int64_t end = v.num_chunks * (block() + 1) / blocks();
    for (int64_t c = v.num_chunks * block() / blocks(); c < end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        if (part.tensor != current) {
            flush();
            current = part.tensor;
        }
        const Global<int64_t> state = v.state_of(part.group);
        const int64_t path = load(state, kPath);
        if (v.one_pass != 0 && !is_exact(path)) continue;
        const Edge<Key> k = edge_of(bound_at<Key>(state, kKKey), part.index);
        if (k.key == nothing<Key>().key) continue;
        const Edge<Key> done = edge_of(path == kRest ? bound_at<Key>(state, kAKey) : nothing<Key>(), part.index);
        int64_t place = kOutput == kEditOnly ? 0 : load(v.tile_sums, c / kStep) + load(v.greater, c);
        with_source(M{}, t, [&](auto source) {
            for_each_step(source, t, part.local, part.n,
                          [&]([[maybe_unused]] auto how, int at, int, int, const auto& delta, const Eight<Key>& key) {
                              const uint32_t chosen = held(key, k, at) & ~held(key, done, at);
                              kept += count_bits(chosen);
                              if constexpr (kOutput != kEditOnly) {
                                  int32_t total;
                                  int64_t slot = place + scan_block(sums, int32_t(count_bits(chosen)), &total);
                                  place += total;
                                  PSE_UNROLL
                                  for (int j = 0; j < kPer; ++j) {
                                      if (((chosen >> j) & 1u) == 0) continue;
                                      const int64_t i = part.local + at + j;
                                      store(simt::global<int64_t>(v.indices, v.record), slot,
                                            kOutput == kList ? i : t.first + i);
                                      if constexpr (kOutput == kEditRecord)
                                          put_bits(v.values, v.record, slot, v.value_bytes, param_bits(source, t, i));
                                      else if constexpr (sizeof(Key) == 8)
                                          store(simt::global<double>(v.values, v.record), slot, double(delta.at[j]));
                                      else
                                          store(simt::global<float>(v.values, v.record), slot, delta.at[j]);
                                      ++slot;
                                  }
                              }
                              if constexpr (kOutput != kList) {
                                  if (ballot(chosen != 0) != 0)
                                      unchanged += edit_eight(how, source, t, part.local + at, chosen, delta, v.scale);
                              }
                          });
        });
    }
    flush();
    if constexpr (kOutput == kEditRecord) {
        // Fewer than m were eligible: -1 and 0 fill up.
        const int64_t used = load(v.tile_sums, (v.num_chunks + kStep - 1) / kStep);
        for (int64_t i = used + block() * kThreads + thread(); i < v.record; i += blocks() * kThreads) {
            store(simt::global<int64_t>(v.indices, v.record), i, int64_t(-1));
            put_bits(v.values, v.record, i, v.value_bytes, 0);
        }
    }
}

// ---- on the host

// s = N^(2/3), as a power of two; and the ranks between the expected place of the m-th entry in the sample and an edge
// of the bracket: csrc/cpu/topm.cpp has the reasons.
static int64_t sample_size(int64_t n) {
    int64_t s = 1 << 12;
    while (s < (1 << 22) && double(s) * double(s) * double(s) < double(n) * double(n)) s *= 2;
    return s;
}
static int64_t sample_margin(int64_t s, int64_t n, int64_t m, bool unrepairable) {
    const double q = double(m) / double(n);
    const double sigma = __builtin_sqrt(double(s) * q * (1.0 - q));
    return unrepairable ? int64_t(12.0 * sigma) + 64 : int64_t(5.0 * sigma) + 16;
}

struct Layout {
    std::vector<int64_t> table, groups;
    int64_t chunks = 0, samples = 0, pool = 0, sampled = 0, largest_sample = 0, largest_pool = 0;
    bool same[4] = {true, true, true, true};  // by dtype: every array of every tensor has it, and no importance
    int64_t bytes = 0;
    int64_t table_at, groups_at, state_at, histogram_at, problem_histogram_at, problems_at, tickets_at, zero_end,
        greater_at, equal_at, tiles_at, sample_keys_at, sample_indices_at, pool_keys_at, pool_indices_at, small_keys_at,
        small_indices_at;
};

static int64_t tags_of(const TopmTensor& t, bool with_params) {
    const int64_t f64 = int64_t(DType::f64);
    const auto aligned = [](int64_t address) { return address % 16 == 0; };
    int64_t tags = t.base_dtype << 4 | t.tuned_dtype << 8;
    tags |= with_params ? t.params_dtype : t.base_dtype;
    tags |= (t.importance_dtype < 0 ? kNoImportance : t.importance_dtype) << 12;
    if (aligned(t.base) && aligned(t.tuned) && (!with_params || aligned(t.params)) &&
        (t.importance_dtype < 0 || aligned(t.importance)))
        tags |= kAligned;
    if (t.base_dtype == f64 || t.tuned_dtype == f64 || (with_params && t.params_dtype == f64)) tags |= kInDouble;
    return tags;
}

static Layout lay_out(const TopmCall& call) {
    Layout l;
    const TopmTensor* tensors = reinterpret_cast<const TopmTensor*>(call.tensors);
    const int64_t* m = reinterpret_cast<const int64_t*>(call.m);
    const int64_t n = call.num_tensors, num_groups = call.per_tensor ? n : 1;
    for (int64_t i = 0; i < n; ++i) {
        const TopmTensor& t = tensors[i];
        const int64_t tags = tags_of(t, !call.select);
        for (int dtype = 0; dtype < 4; ++dtype)
            l.same[dtype] = l.same[dtype] && (tags & 0xffff) == (dtype | dtype << 4 | dtype << 8 | kNoImportance << 12);
        l.table.insert(l.table.end(), {t.params, t.base, t.tuned, t.importance, tags, t.numel, t.first, l.chunks});
        l.chunks += (t.numel + call.chunk - 1) / call.chunk;
    }
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t first = call.per_tensor ? g : 0, count = call.per_tensor ? 1 : n;
        const TopmTensor& last = tensors[first + count - 1];
        const int64_t size = last.first + last.numel - tensors[first].first;
        const int64_t chunk = l.table[size_t(first * kTensorWords + kFirstChunk)];
        const int64_t next =
            first + count < n ? l.table[size_t((first + count) * kTensorWords + kFirstChunk)] : l.chunks;
        const bool sampled = m[g] > 0 && size > 0 && !(call.hooks & kHookTwoPass) &&
                             (size > kUnsampled || (call.hooks & kHookAlwaysSample));
        int64_t s = 0, rank_a = 0, rank_b = 0, capacity = 0;
        if (sampled) {
            s = sample_size(size);
            const int64_t middle = int64_t(double(s) * (double(m[g]) / double(size)));
            const int64_t up = sample_margin(s, size, m[g], call.one_pass != 0);
            const int64_t down = sample_margin(s, size, m[g], false);
            rank_a = middle - up;
            rank_b = middle + down + 1;
            const double room = 1.5 * double(up + down) / double(s) * double(size) + 4096.0;
            capacity = call.hooks & kHookOverflow ? 0 : room < double(size) ? int64_t(room) : size;
        }
        l.groups.insert(l.groups.end(), {m[g], size, s, l.samples, rank_a, rank_b, l.pool, capacity,
                                         sampled ? l.sampled * kProblems : -1, first, count, tensors[first].first,
                                         chunk, next - chunk});
        l.samples += s;
        l.pool += capacity;
        l.sampled += sampled ? 1 : 0;
        l.largest_sample = s > l.largest_sample ? s : l.largest_sample;
        l.largest_pool = capacity > l.largest_pool ? capacity : l.largest_pool;
    }
    const int64_t key = call.wide ? 8 : 4, problems = l.sampled * kProblems;
    const auto take = [&](int64_t bytes) {
        const int64_t at = l.bytes;
        l.bytes += (bytes + 255) / 256 * 256;
        return at;
    };
    l.histogram_at = take(num_groups * kBins * 8);
    l.problem_histogram_at = take(problems * kBins * 8);
    l.problems_at = take(problems * kProblemWords * 8);
    l.tickets_at = take((1 + problems) * 4);
    l.zero_end = l.bytes;
    l.table_at = take(n * kTensorWords * 8);
    l.groups_at = take(num_groups * kGroupWords * 8);
    l.state_at = take(num_groups * kStateWords * 8);
    l.greater_at = take(l.chunks * 4);
    l.equal_at = take(l.chunks * 4);
    l.tiles_at = take(((l.chunks + kStep - 1) / kStep + 1) * 8);
    l.sample_keys_at = take(l.samples * key);
    l.sample_indices_at = take(l.samples * 8);
    l.pool_keys_at = take(l.pool * key);
    l.pool_indices_at = take(l.pool * 8);
    l.small_keys_at = take(problems * kSmall * key);
    l.small_indices_at = take(problems * kSmall * 8);
    return l;
}

template <class Key>
static View<Key> view_of(const TopmCall& call, const Layout& l) {
    const int64_t n = call.num_tensors, num_groups = call.per_tensor ? n : 1, problems = l.sampled * kProblems;
    const auto words = [&](int64_t at, int64_t count) { return simt::global<int64_t>(call.scratch + at, count); };
    View<Key> v;
    v.table = words(l.table_at, n * kTensorWords);
    v.groups = words(l.groups_at, num_groups * kGroupWords);
    v.state = words(l.state_at, num_groups * kStateWords);
    v.histogram = words(l.histogram_at, num_groups * kBins);
    v.problem_histogram = words(l.problem_histogram_at, problems * kBins);
    v.problems = words(l.problems_at, problems * kProblemWords);
    v.tickets = simt::global<uint32_t>(call.scratch + l.tickets_at, 1 + problems);
    v.greater = simt::global<int32_t>(call.scratch + l.greater_at, l.chunks);
    v.equal = simt::global<int32_t>(call.scratch + l.equal_at, l.chunks);
    v.tile_sums = words(l.tiles_at, (l.chunks + kStep - 1) / kStep + 1);
    v.sample_keys = simt::global<Key>(call.scratch + l.sample_keys_at, l.samples);
    v.sample_indices = words(l.sample_indices_at, l.samples);
    v.pool_keys = simt::global<Key>(call.scratch + l.pool_keys_at, l.pool);
    v.pool_indices = words(l.pool_indices_at, l.pool);
    v.small_keys = simt::global<Key>(call.scratch + l.small_keys_at, problems * kSmall);
    v.small_indices = words(l.small_indices_at, problems * kSmall);
    v.kept = simt::global<int64_t>(call.kept, n);
    v.unchanged = simt::global<int64_t>(call.unchanged, n);
    v.nonfinite = simt::global<int64_t>(call.nonfinite, n);
    v.threshold = call.threshold;
    v.indices = call.indices;
    v.values = call.values;
    v.value_bytes = call.value_bytes;
    v.record = call.record;
    v.num_tensors = n;
    v.num_groups = num_groups;
    v.num_chunks = l.chunks;
    v.chunk = call.chunk;
    v.per_tensor = call.per_tensor;
    v.one_pass = call.one_pass;
    v.ordered = call.indices != 0;
    v.scale = call.scale;
    return v;
}

// Launches in a row on one stream; after an error nothing more is launched.
class Launches {
  public:
    explicit Launches(const Target& target) : target_(target) {}
    template <class... Parameters, class... Arguments>
    void operator()(const char* name, int64_t blocks, void (*kernel)(Parameters...), Arguments... arguments) {
        if (error_ == 0) error_ = launch(name, target_, blocks, kThreads, kernel, arguments...);
    }
    void add(int error) { error_ = error_ != 0 ? error_ : error; }
    int error() const { return error_; }

  private:
    Target target_;
    int error_ = 0;
};

template <class M, Output kOutput>
static void launch_apply(Launches& run, const TopmCall& call, const Layout& l, const View<typename M::Key>& v) {
    run("topm_apply", blocks_for(l.chunks, call.blocks), topm_apply<M, kOutput>, v);
}

// M: how the passes read tensors; A: how those do that are rarely run, which is any dtype.
template <class M, class A>
static int settle_as(const TopmCall& call, const Layout& l, const Target& target) {
    using Key = typename M::Key;
    const View<Key> v = view_of<Key>(call, l);
    const int64_t groups = v.num_groups, passes = blocks_for(l.chunks, call.blocks);
    const int64_t rows = groups > v.num_tensors ? groups : v.num_tensors;
    Launches run(target);
    run.add(put_words(target, call.scratch + l.table_at, l.table.data(), int64_t(l.table.size())));
    run.add(put_words(target, call.scratch + l.groups_at, l.groups.data(), int64_t(l.groups.size())));
    if (run.error() == 0)
        run.add(fill_zero(target, reinterpret_cast<void*>(call.scratch + l.histogram_at), l.zero_end - l.histogram_at));
    run("topm_open", (rows + kThreads - 1) / kThreads, topm_open<Key>, v);
    if (l.sampled > 0) {
        // 11 bits a round: the key, then the index (four rounds: groups up to 2^44). Few left end it earlier.
        constexpr int kNarrowings = kRounds<Key> + 4;
        const auto share = [&](int64_t pairs) {
            const int64_t tasks = (pairs + 4 * kStep - 1) / (4 * kStep);
            return tasks < 1 ? int64_t(1) : blocks_for(tasks, call.blocks);
        };
        const int64_t share_sample = share(l.largest_sample), share_pool = share(l.largest_pool);
        run("topm_sample", l.samples / kThreads, topm_sample<Key>, v);
        for (int round = 0; round < kNarrowings; ++round)
            run("topm_narrow", l.sampled * 2 * share_sample, topm_narrow<Key>, v, int64_t(1), share_sample);
        run("topm_bracket", (groups + kThreads - 1) / kThreads, topm_bracket<Key>, v, int(call.hooks));
        if (call.one_pass)
            run("topm_sweep", passes, topm_sweep<M, true>, v);
        else
            run("topm_sweep", passes, topm_sweep<M, false>, v);
        for (int round = 0; round < kNarrowings; ++round)
            run("topm_narrow", l.sampled * share_pool, topm_narrow<Key>, v, int64_t(0), share_pool);
        run("topm_close_pool", l.sampled * share_pool, topm_close_pool<Key>, v, share_pool);
    }
    for (int round = 0; round < kRounds<Key>; ++round) {
        run("topm_count_digits", passes, topm_count_digits<A>, v, round);
        run("topm_settle_digit", groups, topm_settle_digit<Key>, v, round);
    }
    run("topm_count_ties", passes, topm_count_ties<A>, v);
    run("topm_find_tie", groups, topm_find_tie<A>, v);
    if (call.one_pass) launch_apply<A, kEditOnly>(run, call, l, v);
    return run.error();
}

template <class M, class A>
static int apply_as(const TopmCall& call, const Layout& l, const Target& target) {
    const View<typename M::Key> v = view_of<typename M::Key>(call, l);
    Launches run(target);
    if (call.indices != 0)
        run("topm_scan_chunks", (l.chunks + kStep - 1) / kStep, topm_scan_chunks<typename M::Key>, v);
    if (call.select)
        launch_apply<A, kList>(run, call, l, v);
    else if (call.indices != 0)
        launch_apply<M, kEditRecord>(run, call, l, v);
    else
        launch_apply<M, kEditOnly>(run, call, l, v);
    return run.error();
}

int64_t topm_scratch_bytes(const TopmCall& call) { return lay_out(call).bytes; }

int topm_settle(const TopmCall& call, const Target& target) {
    using Any = Mixed<float, uint32_t>;
    using Wide = Mixed<double, uint64_t>;
    const Layout l = lay_out(call);
    if (call.wide) return settle_as<Wide, Wide>(call, l, target);
    if (l.same[int(DType::bf16)]) return settle_as<Same<bf16_t>, Any>(call, l, target);
    if (l.same[int(DType::f16)]) return settle_as<Same<f16_t>, Any>(call, l, target);
    if (l.same[int(DType::f32)]) return settle_as<Same<float>, Any>(call, l, target);
    return settle_as<Any, Any>(call, l, target);
}

int topm_apply(const TopmCall& call, const Target& target) {
    using Any = Mixed<float, uint32_t>;
    using Wide = Mixed<double, uint64_t>;
    const Layout l = lay_out(call);
    if (call.wide) return apply_as<Wide, Wide>(call, l, target);
    if (l.same[int(DType::bf16)]) return apply_as<Same<bf16_t>, Any>(call, l, target);
    if (l.same[int(DType::f16)]) return apply_as<Same<f16_t>, Any>(call, l, target);
    if (l.same[int(DType::f32)]) return apply_as<Same<float>, Any>(call, l, target);
    return apply_as<Any, Any>(call, l, target);
}

}  // namespace cuda
}  // namespace pse
