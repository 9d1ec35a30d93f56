// The exact select: 11 bits of the key a pass, then ties by lowest index.
#pragma once
#include "cuda/topm_view.cuh"

namespace pse {
namespace cuda {

constexpr int kCopies = 4;  // of the block's bins, two warps each: 32 KB, six blocks an SM

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

}  // namespace cuda
}  // namespace pse
