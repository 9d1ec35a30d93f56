// The exact select of 3, over the tensors themselves: 11 bits of the key a step, then ties by lowest index.
//
// A block walks its run of chunks group by group; the last of the blocks that share a group ends the step for it. A
// group that one block has for itself needs nobody else: all steps in the first launch.
#pragma once
#include "cuda/topm_rank.cuh"

namespace pse {
namespace cuda {

constexpr int kCopies = 4;  // of the block's bins, two warps each: 32 KB
template <class Key>
constexpr int kDigits = (KeyTraits<Key>::bits + kDigitBits - 1) / kDigitBits;

PSE_DEVICE bool is_exact(int64_t path) { return path == kExact || path == kRest; }

// Which chunks of a group a block has, and how many blocks share the group.
struct Run {
    int64_t group, begin, end, blocks;
};

// What of a chunk is edited already, and not to be selected again: what A holds. A journal says it without a look at
// the edited, which may be what base or tuned are.
template <class Key>
struct Done {
    Edge<Key> edge;
    int64_t row;  // in the journal; -1: there is none
};
template <class Key>
PSE_DEVICE Done<Key> done_of(const View<Key>& v, const TensorRow& t, const Part& part) {
    const Global<int64_t> state = v.state_of(part.group);
    const bool rest = load(state, kPath) == kRest;
    return {edge_of(rest ? bound_at<Key>(state, kAKey) : nothing<Key>(), part.index),
            rest && v.journaled() ? row_of(t, part.tensor, part.local) : int64_t(-1)};
}
// Bit j: entry j of this thread's `mine`, at this place of the chunk, is edited already.
template <class Key, class Source>
PSE_DEVICE uint32_t already(const View<Key>& v, const Done<Key>& done, Source source,
                            const typename Source::Entries& entries, int at, int mine) {
    if (done.row < 0) return held(source, entries, done.edge, at);
    return mine > 0 ? (load(v.chosen, done.row * kRowWords + at / 32) >> (at % 32)) & 0xffu : 0u;
}
// Sets the bits that already() reads, of a run of chunks, out of the journal.
template <class Key>
PSE_DEVICE void spread_journal(const View<Key>& v, const Run& run) {
    for (int64_t c = run.begin; c < run.end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        for (int at = warp() * kRow; at < part.n; at += kStep) {
            const int64_t row = row_of(t, part.tensor, part.local + at), mark = load(v.marks, row);
            for (int i = lane(); i < entries_of_mark(mark); i += kWarp)
                set_bit(v.chosen, row, int(load(v.journal_places, slot_of_mark(mark) + i)));
        }
    }
    sync_block();
}

// Adds the next digit of every key in the range. Entries without a delta (key 1: six of seven where a checkpoint was
// barely tuned) would fight over one bin: they are left out, and keep_part() knows how many they are.
template <class M, class Key = typename M::Key>
PSE_DEVICE void count_digits(const View<Key>& v, const Run& run, const Problem<Key>& x, bool first_look,
                             Shared<uint32_t> bins) {
    const int shift = x.shift();
    const Key top = Key(int64_t(KeyTraits<Key>::none) - x.low), span = Key(x.high - x.low);
    const int copy = warp() % kCopies * kBins;
    int64_t tensor = -1;
    int excluded = 0;
    const auto flush = [&] {
        if (tensor < 0 || !first_look) return;
        add_count(v.nonfinite, tensor, excluded);
        add_count(v.state, run.group * kStateWords + kExcluded, excluded);
        excluded = 0;
    };
    clear_bins(bins, kCopies * kBins);
    for (int64_t c = run.begin; c < run.end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        if (part.tensor != tensor) flush();
        tensor = part.tensor;
        const Done<Key> done = done_of(v, t, part);
        with_source(M{}, t, [&](auto source) {
            for_each_step(source, t, part.local, part.n, [&](auto, int at, int n, int none, const auto& entries) {
                const Eight<Key>& key = entries.key;
                excluded += none;
                const uint32_t left_out = already(v, done, source, entries, at, n);
                int bin = 0;
                uint32_t equal = 0;  // neighbours are counted at once
                PSE_UNROLL
                for (int j = 0; j < kPer; ++j) {
                    const Key place = Key(top - key.at[j]);
                    const bool counted = key.at[j] > 1 && ((left_out >> j) & 1u) == 0 && place <= span;
                    const int digit = int(place >> shift);
                    if (counted && digit != bin && equal != 0) {
                        atomic_add(bins, copy + bin, equal);
                        equal = 0;
                    }
                    bin = counted ? digit : bin;
                    equal += counted ? 1u : 0u;
                }
                if (equal != 0) atomic_add(bins, copy + bin, equal);
            });
        });
    }
    flush();
    add_bins(bins, kCopies, v.histogram_of(run.group, kK));
}

// The last block: one digit more is known, and, after the first look, how many entries there are to select from.
template <class Key>
PSE_DEVICE void settle_digit(const View<Key>& v, int64_t g, Problem<Key> x, bool first_look, Shared<int64_t> sums) {
    int64_t mine[kBinsPer];
    take_parts(v.histogram_of(g, kK), mine);
    if (first_look) {
        x.count -= load(v.state_of(g), kExcluded);
        x.rank = x.rank < x.count ? x.rank : x.count;
    }
    if (x.rank > 0)
        keep_part(v, g, kK, x, mine, sums);
    else if (thread() == 0)
        close_problem(v, g, kK, nothing<Key>());
}

// How many entries of each chunk have K's key, and how many a larger one (or are edited already).
template <class M, class Key = typename M::Key>
PSE_DEVICE void count_ties(const View<Key>& v, const Run& run, Key wanted, Shared<int64_t> sums) {
    for (int64_t c = run.begin; c < run.end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        const Done<Key> done = done_of(v, t, part);
        int64_t both = 0;  // ties in the low half, larger keys in the high half
        with_source(M{}, t, [&](auto source) {
            for_each_step(source, t, part.local, part.n, [&](auto, int at, int n, int, const auto& entries) {
                const Eight<Key>& key = entries.key;
                const uint32_t left_out = already(v, done, source, entries, at, n);
                PSE_UNROLL
                for (int j = 0; j < kPer; ++j) {
                    const bool counted = ((left_out >> j) & 1u) == 0;
                    both += !counted ? 0 : key.at[j] == wanted ? 1 : key.at[j] > wanted ? int64_t(1) << 32 : 0;
                }
            });
        });
        int64_t total;
        scan_block(sums, both, &total);
        if (thread() == 0) {
            store(v.equal, c, int32_t(total & 0xffffffff));
            const int32_t edited = done.row < 0 ? 0 : load(v.greater, c);  // by the sweep; a call comes here once
            store(v.greater, c, edited + int32_t(total >> 32));
        }
    }
}

// The last block: the chunk that has the rank-th tie, then the tie.
template <class M, class Key = typename M::Key>
PSE_DEVICE void find_tie(const View<Key>& v, int64_t g, const Problem<Key>& x, Shared<int64_t> sums,
                         Shared<int64_t> found) {
    const Global<int64_t> state = v.state_of(g);
    const int64_t first = load(v.group(g), kGroupChunk), end = first + load(v.group(g), kGroupChunks);
    int64_t before = 0;
    for (int64_t tile = first; before < x.rank && tile < end; tile += kThreads) {
        const int64_t c = tile + thread();
        int64_t total;
        const int64_t mine = c < end ? load(v.equal, c) : 0, at = before + scan_block(sums, mine, &total);
        if (at < x.rank && x.rank <= at + mine) {
            store(found, 0, c);
            store(found, 1, x.rank - at);
        }
        before += total;
    }
    sync_block();
    const int64_t c = load(found, 0), ties = load(found, 1);
    TensorRow t;
    const Part part = part_of(v, c, &t);
    const Done<Key> done = done_of(v, t, part);
    int64_t seen = 0;
    with_source(M{}, t, [&](auto source) {
        for_each_step(source, t, part.local, part.n, [&](auto, int at, int n, int, const auto& entries) {
            const Eight<Key>& key = entries.key;
            uint32_t tied = 0;
            PSE_UNROLL
            for (int j = 0; j < kPer; ++j) tied |= uint32_t(key.at[j] == x.key ? 1 : 0) << j;
            tied &= ~already(v, done, source, entries, at, n);
            int64_t total, place = seen + scan_block(sums, int64_t(count_bits(tied)), &total);
            seen += total;
            for (int j = 0; j < kPer; ++j) {
                place += (tied >> j) & 1u;
                if (((tied >> j) & 1u) == 0 || place != ties) continue;
                close_problem(v, g, kK, Bound<Key>{x.key, part.index + at + j});
                store(state, kTieChunk, c);
                store(state, kTieTaken, ties);
            }
        });
    });
}

// One step for one group: a digit, or, after the last, the tie.
template <class M, class Key = typename M::Key>
PSE_DEVICE void exact_step(const View<Key>& v, const Run& run, int step, const RankRoom<Key>& room) {
    const int64_t g = run.group;
    const Problem<Key> x = problem_at<Key>(v.problem_of(g, kK));
    if (!x.open) return;
    const int64_t swept = load(v.state_of(g), kSwept);
    const bool first_look = step == 0 && swept == 0, all = x.rank == x.count;
    if (!x.by_index)
        count_digits<M>(v, run, x, first_look, room.bins);
    else if (step == kDigits<Key> && (v.ordered != 0 || !all))
        count_ties<M>(v, run, x.key, room.sums);
    if (!last_block(v.tickets, v.problem(g, kK), uint32_t(run.blocks))) return;
    if (!x.by_index) {
        settle_digit(v, g, x, first_look, room.sums);
    } else if (step == kDigits<Key>) {
        put_thresholds(v, g, x.key);
        if (!all) find_tie<M>(v, g, x, room.sums, room.indices);
        if (all && thread() == 0) {
            close_problem(v, g, kK, Bound<Key>{x.key, load(v.group(g), kSize) - 1});
            store(v.state_of(g), kTieChunk, v.num_chunks);
        }
    }
    sync_block();
}

// By `share` blocks of which this is one.
template <class M, class Key = typename M::Key>
PSE_DEVICE void exact_walk(const View<Key>& v, int step, int64_t slice, int64_t share, const RankRoom<Key>& room) {
    const auto owner = [&](int64_t chunk) { return ((chunk + 1) * share - 1) / v.num_chunks; };
    const int64_t end = v.num_chunks * (slice + 1) / share;
    int64_t c = v.num_chunks * slice / share;
    while (c < end) {
        const int64_t g =
            v.per_tensor != 0 ? find_row(v.table, kTensorWords, kFirstChunk, v.num_tensors, c) : int64_t(0);
        const int64_t first = load(v.group(g), kGroupChunk), behind = first + load(v.group(g), kGroupChunks);
        const int64_t path = load(v.state_of(g), kPath);
        const Run run = {g, c, behind < end ? behind : end, owner(behind - 1) - owner(first) + 1};
        c = run.end;
        if (!is_exact(path)) continue;
        if (step == 0 && path == kRest && v.journaled()) spread_journal(v, run);
        const int last = run.blocks == 1 ? kDigits<Key> : step;
        for (int s = step; s <= last; ++s) exact_step<M>(v, run, s, room);
    }
}

}  // namespace cuda
}  // namespace pse
