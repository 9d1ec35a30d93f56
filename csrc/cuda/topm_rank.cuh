// The entry of one rank: a radix select, 11 bits a pass off a range, first of the key, then of the index.
//
// Pass   The blocks of a problem add up how many entries each of 2048 parts of the range has; the last block keeps the
//        part that has the wanted rank. So a digit costs one launch.
// End    The last launch lists what is left, and its last block takes the remaining digits alone, from the list; 256 or
//        fewer, one a thread, are ranked by comparing all with all. Lists have room for a quarter of the sample; where
//        more is left (a tie of most entries), the block reads the pairs themselves: slow, and as exact.
// Samples may repeat: equal pairs have one place.
#pragma once
#include "cuda/topm_view.cuh"

namespace pse {
namespace cuda {

template <class Key>
struct Problem {
    bool open, by_index;
    Key key;  // by_index: the one that is left
    int64_t low, high, rank, count;

    PSE_HD int shift() const {
        int bits = 0;
        while (((high - low) >> bits) >= kBins) ++bits;
        return bits;
    }
    // Descending key is ascending complement. -1: outside, as is every key 0.
    PSE_HD int64_t place(Key k, int64_t i) const {
        const int64_t value = by_index ? i : int64_t(KeyTraits<Key>::none) - int64_t(k);
        const bool inside = value >= low && value <= high && (!by_index || k == key);
        return inside ? value - low : -1;
    }
};

template <class Key>
PSE_DEVICE Problem<Key> problem_at(Global<int64_t> words) {
    const int64_t open = load(words, kOpen), by_index = load(words, kByIndex), key = load(words, kKey);
    const int64_t low = load(words, kLow), high = load(words, kHigh);
    const int64_t rank = load(words, kRank), count = load(words, kCount);
    return {open != 0, by_index != 0, Key(key), low, high, rank, count};
}
template <class Key>
PSE_DEVICE void put_problem(Global<int64_t> words, const Problem<Key>& x) {
    store(words, kOpen, int64_t(x.open));
    store(words, kByIndex, int64_t(x.by_index));
    store(words, kKey, int64_t(x.key));
    store(words, kLow, x.low);
    store(words, kHigh, x.high);
    store(words, kRank, x.rank);
    store(words, kCount, x.count);
    store(words, kCollected, int64_t(0));
}
template <class Key>
PSE_HD Problem<Key> any_key(int64_t rank, int64_t count) {
    return {true, false, Key(0), 1, int64_t(KeyTraits<Key>::none - 1),
            rank, count};  // the last: the complement of key 1
}

// One thread has found the place.
template <class Key>
PSE_DEVICE void close_problem(const View<Key>& v, int64_t g, int which, Bound<Key> found) {
    put_bound(v.state_of(g), kKKey + 2 * which, found);
    store(v.problem_of(g, which), kOpen, int64_t(0));
}

// Keeps the part of the range that has the rank; `mine` are this thread's parts of 2^shift, neighbours, of kBins in the
// block. What was not counted has the last key of the range. A whole block calls.
template <class Key>
PSE_DEVICE void keep_part(const View<Key>& v, int64_t g, int which, const Problem<Key>& x, int64_t (&mine)[kBinsPer],
                          Shared<int64_t> sums PSE_CALLER) {
    const Global<int64_t> words = v.problem_of(g, which);
    const int shift = x.shift(), first = thread() * kBinsPer;
    int64_t sum = 0, total;
    PSE_UNROLL
    for (int j = 0; j < kBinsPer; ++j) sum += mine[j];
    scan_block(sums, sum, &total);
    const int64_t last = (x.high - x.low) >> shift, missing = x.count - total;
    PSE_UNROLL
    for (int j = 0; j < kBinsPer; ++j) mine[j] += first + j == last ? missing : 0;
    if (last >= first && last < first + kBinsPer) sum += missing;
    int64_t before = scan_block(sums, sum, &total);
    PSE_UNROLL
    for (int j = 0; j < kBinsPer; ++j) {
        if (before < x.rank && x.rank <= before + mine[j]) {
            const int64_t from = x.low + (int64_t(first + j) << shift), end = from + ((int64_t(1) << shift) - 1);
            Problem<Key> left = x;
            left.low = from;
            left.high = end < x.high ? end : x.high;
            left.rank = x.rank - before;
            left.count = mine[j];
            const bool single = left.low == left.high;
            if (single && !x.by_index) {
                left.by_index = true;
                left.key = Key(int64_t(KeyTraits<Key>::none) - from);
                left.low = 0;
                left.high = load(v.group(g), kSize) - 1;
            }
            put_problem(words, left);
            if (single && x.by_index) close_problem(v, g, which, Bound<Key>{x.key, from});
        }
        before += mine[j];
    }
    sync_block();
}

// This thread's parts of a histogram that the blocks before have added up; it is 0 again afterwards.
PSE_DEVICE void take_parts(Global<int64_t> histogram, int64_t (&mine)[kBinsPer]) {
    PSE_UNROLL
    for (int j = 0; j < kBinsPer; ++j) {
        mine[j] = load(histogram, thread() * kBinsPer + j);
        store(histogram, thread() * kBinsPer + j, int64_t(0));
    }
}

PSE_DEVICE void clear_bins(Shared<uint32_t> bins, int count PSE_CALLER) {
    for (int b = thread(); b < count; b += kThreads) store(bins, b, 0u);
    sync_block();
}
PSE_DEVICE void add_bins(Shared<uint32_t> bins, int copies, Global<int64_t> histogram PSE_CALLER) {
    sync_block();
    for (int b = thread(); b < kBins; b += kThreads) {
        uint32_t sum = 0;
        for (int each = 0; each < copies; ++each) sum += load(bins, each * kBins + b);
        if (sum != 0) atomic_add(histogram, b, int64_t(sum));
    }
}

// ---- among pairs: a sample, or the candidates

template <class Key>
struct Pairs {
    Global<Key> keys;
    Global<int64_t> indices;
    int64_t n;
};

// Calls body(key, index) for pairs [begin, end) and, so that warps stay whole, with key 0 beyond; eight loads of a
// thread are in flight. A whole block calls.
template <class Key, class Body>
PSE_DEVICE void for_each_pair(const Pairs<Key>& pairs, int64_t begin, int64_t end, const Body& body) {
    for (int64_t at = begin + thread(); at - thread() < end; at += kStep) {
        Key key[kPer];
        int64_t index[kPer];
        PSE_UNROLL
        for (int j = 0; j < kPer; ++j) {
            const int64_t i = at + j * kThreads;
            key[j] = Key(0);
            index[j] = 0;
            if (i < end) key[j] = load(pairs.keys, i);
            if (i < end) index[j] = load(pairs.indices, i);
        }
        PSE_UNROLL
        for (int j = 0; j < kPer; ++j) body(without_sign(key[j]), index[j]);
    }
}

// What a block needs in shared memory.
template <class Key>
struct RankRoom {
    Shared<uint32_t> bins, taken;
    Shared<int64_t> sums, indices;
    Shared<Key> keys;
};
#define PSE_RANK_ROOM(Key, name, copies)              \
    PSE_SHARED(uint32_t, name##_bins, copies* kBins); \
    PSE_SHARED(uint32_t, name##_taken, 1);            \
    PSE_SHARED(int64_t, name##_sums, kWarps);         \
    PSE_SHARED(int64_t, name##_indices, kThreads);    \
    PSE_SHARED(Key, name##_keys, kThreads);           \
    const RankRoom<Key> name = {name##_bins, name##_taken, name##_sums, name##_indices, name##_keys}

template <class Key>
PSE_DEVICE void count_pairs(const Problem<Key>& x, const Pairs<Key>& pairs, int64_t begin, int64_t end,
                            Shared<uint32_t> bins) {
    const int shift = x.shift();
    clear_bins(bins, kBins);
    for_each_pair(pairs, begin, end, [&](Key key, int64_t index) {
        const int64_t place = x.place(key, index);
        if (place >= 0) atomic_add(bins, int(place >> shift), 1u);
    });
}

// One digit, by `share` blocks of which this is one.
template <class Key>
PSE_DEVICE void narrow(const View<Key>& v, int64_t g, int which, const Pairs<Key>& pairs, int64_t slice, int64_t share,
                       const RankRoom<Key>& room PSE_CALLER) {
    const Problem<Key> x = problem_at<Key>(v.problem_of(g, which));
    if (!x.open || x.count <= kThreads) return;
    count_pairs(x, pairs, pairs.n * slice / share, pairs.n * (slice + 1) / share, room.bins);
    const Global<int64_t> histogram = v.histogram_of(g, which);
    add_bins(room.bins, 1, histogram);
    if (!last_block(v.tickets, v.problem(g, which), uint32_t(share))) return;
    int64_t mine[kBinsPer];
    take_parts(histogram, mine);
    keep_part(v, g, which, x, mine, room.sums);
}

// At most one a thread is left.
template <class Key>
PSE_DEVICE void rank_few(const View<Key>& v, int64_t g, int which, const Problem<Key>& x, const Pairs<Key>& pairs,
                         const RankRoom<Key>& room) {
    if (thread() == 0) store(room.taken, 0, 0u);
    sync_block();
    for_each_pair(pairs, 0, pairs.n, [&](Key key, int64_t index) {
        if (x.place(key, index) < 0) return;
        const uint32_t slot = atomic_add(room.taken, 0, 1u);
        store(room.keys, slot, key);
        store(room.indices, slot, index);
    });
    sync_block();
    const int count = int(x.count);
    if (thread() >= count) return;
    const Bound<Key> mine = {load(room.keys, thread()), load(room.indices, thread())};
    int64_t place = 1;
    for (int j = 0; j < count; ++j) {
        const Key key = load(room.keys, j);
        const int64_t index = load(room.indices, j);
        const bool equal = key == mine.key && index == mine.index;
        place += equal ? j < thread() : mine.holds(key, index);
    }
    if (place == x.rank) close_problem(v, g, which, mine);
}

// All that is left, by `share` blocks of which this is one.
template <class Key>
PSE_DEVICE void finish(const View<Key>& v, int64_t g, int which, const Pairs<Key>& pairs, int64_t slice, int64_t share,
                       const RankRoom<Key>& room PSE_CALLER) {
    const Global<int64_t> words = v.problem_of(g, which);
    Problem<Key> x = problem_at<Key>(words);
    if (!x.open) return;
    const int64_t space = load(v.group(g), kSamples) / 4;
    const int64_t list_first = load(v.group(g), kListFirst) + which * space;
    const Pairs<Key> list = {v.list_keys + list_first, v.list_indices + list_first, x.count};
    const bool listed = x.count <= space;
    if (listed) {
        for_each_pair(pairs, pairs.n * slice / share, pairs.n * (slice + 1) / share, [&](Key key, int64_t index) {
            const bool left = x.place(key, index) >= 0;
            const uint32_t votes = ballot(left);
            if (votes == 0) return;
            int64_t slot = 0;
            if (lane() == 0) slot = atomic_add(words, kCollected, int64_t(count_bits(votes)));
            slot = shuffle(slot, 0) + count_bits(votes & ((1u << lane()) - 1u));
            if (left) store(list.keys, slot, key);
            if (left) store(list.indices, slot, index);
        });
    }
    if (!last_block(v.tickets, v.problem(g, which), uint32_t(share))) return;
    const Pairs<Key> from = {listed ? list.keys : pairs.keys, listed ? list.indices : pairs.indices,
                             listed ? list.n : pairs.n};
    while (x.open && x.count > kThreads) {
        count_pairs(x, from, 0, from.n, room.bins);
        sync_block();
        int64_t mine[kBinsPer];
        PSE_UNROLL
        for (int j = 0; j < kBinsPer; ++j) mine[j] = load(room.bins, thread() * kBinsPer + j);
        keep_part(v, g, which, x, mine, room.sums);
        x = problem_at<Key>(words);
    }
    if (x.open) rank_few(v, g, which, x, from, room);
}

}  // namespace cuda
}  // namespace pse
