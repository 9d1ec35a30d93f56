// An edit in one pass that wants a record: the sweep notes what it edits, and at the end that is put in order.
//
// Row      256 neighbours of a tensor: what a warp has in a step.
// journal  The edited of a row, together and in order: their places in it, and the bits they had before.
// mark     Of a row: where these start, and how many they are.
// chosen   A bit per entry, 0 from the opening: what else is selected, known when the group is settled, edited here.
//          Where the exact select goes over what is not edited yet, the edited until then.
// Bytes    At density 0.10 of bf16: 0.33 N written and read, 0.13 N cleared and read. A second look is 4 N.
#pragma once
#include "cuda/topm_exact.cuh"
#include "cuda/topm_pool.cuh"

namespace pse {
namespace cuda {

// The bits of a param: all of the call have these, or fit them.
template <class M>
struct OldBits {
    using type = int32_t;
};
template <>
struct OldBits<Same<bf16_t>> {
    using type = int16_t;
};
template <>
struct OldBits<Same<f16_t>> {
    using type = int16_t;
};
template <class R>
struct OldBits<Mixed<R, uint64_t>> {
    using type = int64_t;
};

// What a warp has to say, until one atomic can serve several rows. Whole warps call. It is what edit_eight() calls with
// the params as they were.
template <class Old>
struct Journal {
    Shared<uint8_t> places;      // kRow of each, of this warp: of the entries that wait here,
    Shared<Old> old;             // and their bits
    Shared<Old> row;             // the row in hand, as it was where it is touched
    int staged = 0, latest = 0;  // entries that wait, and so many before the row in hand
    int pending = 0;             // rows that they belong to,
    int32_t pending_row = 0;     // lane p: the p-th of these (31 bits: 5e11 entries),
    int start = 0, entries = 0;  // whose entries start here

    PSE_METHOD Journal(Shared<uint8_t> p, Shared<Old> o, Shared<Old> r) : places(p), old(o), row(r) {}

    // Where entry j of a lane's eight is in `row`: lanes meet in no bank.
    PSE_METHOD int seat(int of_lane, int j) const {
        constexpr int kEach = sizeof(Old) == 2 ? 2 : 1;
        return (j / kEach * kWarp + of_lane) * kEach + j % kEach;
    }
    template <class T>
    PSE_METHOD void eight(const Packed<T>& x) const {
        PSE_UNROLL
        for (int w = 0; w < kPer / Packed<T>::kEach; ++w) {
            if constexpr (sizeof(Old) == 2) {
                Vector<Old, 2> pair;
                __builtin_memcpy(&pair, &x.words[w], sizeof pair);
                store_vector<2>(row, seat(lane(), 2 * w), pair);
            } else {
                PSE_UNROLL
                for (int e = 0; e < Packed<T>::kEach; ++e)
                    one(w * Packed<T>::kEach + e, x.at(w * Packed<T>::kEach + e));
            }
        }
    }
    template <class T>
    PSE_METHOD void one(int j, T x) const {
        store(row, seat(lane(), j), Old(bits_of(x)));
    }

    // Takes a row in hand, of which this lane has these entries (bit j: the j-th of its eight), and writes their
    // places.
    template <class Key>
    PSE_METHOD void open_row(const View<Key>& v, int64_t g, int64_t opened, uint32_t mine) {
        const int through = scan_warp(count_bits(mine)), total = shuffle(through, kWarp - 1);
        if (staged + total > kRow || pending == kWarp) close(v, g);
        if (lane() == pending) {
            pending_row = int32_t(opened);
            start = staged;
            entries = total;
        }
        ++pending;
        int slot = staged + through;
        for (uint32_t rest = mine; rest != 0;) {
            const int j = kWarp - 1 - count_leading_zeros(rest);
            store(places, --slot, uint8_t(lane() * kPer + j));
            rest ^= 1u << j;
        }
        latest = staged;
        staged += total;
    }
    // Its entries have been edited.
    PSE_METHOD void close_row() const {
        sync_warp();  // places and row are written
        const auto keep = [&](int i) {
            const int place = load(places, i);
            store(old, i, load(row, seat(place / kPer, place % kPer)));
        };
        int i = latest + lane();
        if (i < staged) keep(i);  // nearly always all: no loop is set up
        if (staged - latest > kWarp)
            for (i += kWarp; i < staged; i += kWarp) keep(i);
        sync_warp();  // and read
    }

    // Writes it all; before the group changes, and at the end.
    template <class Key>
    PSE_METHOD void close(const View<Key>& v, int64_t g PSE_CALLER) {
        if (pending == 0) return;
        const int64_t first = load(v.group(g), kJournalFirst), end = first + load(v.group(g), kM);
        int64_t slot = 0;
        if (lane() == 0) slot = first + atomic_add(v.state_of(g), kJournaled, int64_t(staged));
        slot = shuffle(slot, 0);
        if (lane() < pending) store(v.marks, pending_row, mark_of(slot + start, entries));
        const Global<Old> journal = simt::global<Old>(v.journal, v.journal_size);
        const int fit = slot + staged <= end ? staged : 0;  // else params are spoilt: decide()
        for (int i = lane(); i < fit; i += kWarp) {
            store(v.journal_places, slot + i, load(places, i));
            store(journal, slot + i, load(old, i));
        }
        sync_warp();  // before others come
        staged = pending = 0;
    }
};

// Where K was found over the tensors: what it holds beyond what is edited is chosen. By `share` blocks of which this is
// one.
template <class M, class Key = typename M::Key>
PSE_DEVICE void choose_walk(const View<Key>& v, int64_t slice, int64_t share) {
    const int64_t end = v.num_chunks * (slice + 1) / share;
    for (int64_t c = v.num_chunks * slice / share; c < end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        const Global<int64_t> state = v.state_of(part.group);
        if (!is_exact(load(state, kPath))) {
            c = last_chunk_of(v, part.group);
            continue;
        }
        const Edge<Key> k = edge_of(bound_at<Key>(state, kKKey), part.index);
        const Done<Key> done = done_of(v, t, part);
        with_source(M{}, t, [&](auto source) {
            for_each_step(source, t, part.local, part.n, [&](auto, int at, int mine, int, const auto& entries) {
                const uint32_t edited = already(v, done, source, entries, at, mine);
                const uint32_t chosen = held(source, entries, k, at) & ~edited;
                const int64_t row = row_of(t, part.tensor, part.local + at);
                sync_warp();  // the lanes that share a word have read it
                // This thread's byte: the edited give way to the chosen.
                if (chosen != edited)
                    atomic_add(v.chosen, row * kRowWords + at % kRow / 32, (chosen - edited) << (at % 32));
            });
        });
    }
}

constexpr int kRowLanes = 4;              // a lane has 64 entries of a row,
constexpr int kRows = kWarp / kRowLanes;  // a warp so many rows, which are neighbours, and a block a chunk;
constexpr int kAtOnce = 4;                // of these the first edited are on their way together

static_assert(kRows * kWarps * kRow == kLargestChunk, "a block has all rows of a chunk");

// The sum of x over this lane and those before it that have the same row.
PSE_DEVICE int scan_row(int x PSE_CALLER) {
    PSE_UNROLL
    for (int by = 1; by < kRowLanes; by *= 2) {
        const int other = shuffle_up(x, by);
        if (lane() % kRowLanes >= by) x += other;
    }
    return x;
}

// Puts the journal in order, and edits and records the chosen.
template <class Key, class Old>
PSE_KERNEL(kThreads, (sizeof(Key) == 8 ? 2 : 4))
topm_record(View<Key> v) {
    after_earlier_launches();
    PSE_SHARED(int32_t, totals, kWarps);            // entries of each warp
    PSE_SHARED(uint64_t, chosen_of, kThreads);      // of each lane's 64,
    PSE_SHARED(int32_t, chosen_before, kThreads);   // and of the lanes before it in the row
    PSE_SHARED(uint32_t, edited_of, 2 * kThreads);  // as chosen_of, two words a lane
    const Global<Old> journal = simt::global<Old>(v.journal, v.journal_size);
    const Global<int64_t> indices = simt::global<int64_t>(v.indices, v.record);
    const auto put = [&](int64_t slot, int64_t bits) {
        if (v.value_bytes == int64_t(sizeof(Old)))
            store(simt::global<Old>(v.values, v.record), slot, Old(bits));
        else
            put_bits(v.values, v.record, slot, v.value_bytes, bits);
    };
    int64_t current = -1;
    int kept = 0, unchanged = 0;
    const auto flush = [&] {
        if (current < 0) return;
        add_count(v.kept, current, kept);
        add_count(v.unchanged, current, unchanged);
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
        if (bound_at<Key>(state, kKKey).key == nothing<Key>().key) continue;
        const bool journaled = load(state, kPath) != kExact;
        const int64_t first_row = row_of(t, part.tensor, part.local), first = t.first + part.local;
        const int rows = (part.n + kRow - 1) / kRow;
        int64_t at = load(v.tile_sums, c / kStep) + load(v.greater, c);
        // Of a lane's row: what is chosen of its 64, where the edited are, where the row starts among the warp's.
        const int mine = warp() * kRows + lane() / kRowLanes, piece = lane() % kRowLanes;
        uint64_t chosen = 0;
        int64_t mark = 0;
        if (mine < rows) {
            const auto words = load_vector<2>(v.chosen, (first_row + mine) * kRowWords + piece * 2);
            chosen = uint64_t(words.at[1]) << 32 | words.at[0];
            if (journaled) mark = load(v.marks, first_row + mine);
        }
        const int through = scan_row(count_bits(chosen));
        const int all = piece == kRowLanes - 1 ? through + entries_of_mark(mark) : 0;
        const int before = scan_warp(all) - all;
        sync_block();  // what the last chunk left is read
        if (lane() == kWarp - 1) store(totals, warp(), before + all);
        store(chosen_of, thread(), chosen);
        store(chosen_before, thread(), through - count_bits(chosen));
        store(edited_of, 2 * thread(), 0u);
        store(edited_of, 2 * thread() + 1, 0u);
        sync_block();
        PSE_UNROLL
        for (int w = 0; w < kWarps; ++w) {
            const int32_t total = load(totals, w);
            at += w < warp() ? total : 0;
        }
        const int64_t start = at + before;  // of the lane's row, in the record
        for (int some = 0; some < kRows; some += kAtOnce) {
            uint32_t places[kAtOnce];
            Old old[kAtOnce];
            PSE_UNROLL
            for (int r = 0; r < kAtOnce; ++r) {
                const int64_t its = shuffle(mark, (some + r) * kRowLanes);
                places[r] = 0;
                old[r] = 0;
                if (lane() >= entries_of_mark(its)) continue;
                places[r] = load(v.journal_places, slot_of_mark(its) + lane());
                old[r] = load(journal, slot_of_mark(its) + lane());
            }
            PSE_UNROLL
            for (int r = 0; r < kAtOnce; ++r) {
                const int leader = (some + r) * kRowLanes;
                const int64_t its = shuffle(mark, leader), slot = shuffle(start, leader);
                const int64_t from = first + int64_t(warp() * kRows + some + r) * kRow;
                const int edited = entries_of_mark(its);
                for (int i = lane(); i < edited; i += kWarp) {
                    if (i >= kWarp) {
                        places[r] = load(v.journal_places, slot_of_mark(its) + i);
                        old[r] = load(journal, slot_of_mark(its) + i);
                    }
                    const int p = int(places[r]), lane_of = warp() * kWarp + leader + p / 64;
                    const uint64_t below = load(chosen_of, lane_of) & ((uint64_t(1) << (p % 64)) - 1);
                    const int64_t to = slot + i + load(chosen_before, lane_of) + count_bits(below);
                    atomic_or(edited_of, lane_of * 2 + p % 64 / 32, 1u << (p % 32));
                    store(indices, to, from + p);
                    put(to, old[r]);
                }
            }
        }
        // Read back, so that they take no registers all the while.
        const uint64_t chosen_here = load(chosen_of, thread());
        sync_warp();  // the edited of the warp's rows are known
        const uint64_t edited_here = uint64_t(load(edited_of, 2 * thread() + 1)) << 32 | load(edited_of, 2 * thread());
        const int edited_count = count_bits(edited_here);
        const int64_t from_here = start + load(chosen_before, thread()) + scan_row(edited_count) - edited_count;
        for (uint64_t rest = chosen_here; rest != 0; rest &= rest - 1) {
            const uint64_t bit = rest & (0 - rest);
            const int p = piece * 64 + 63 - count_leading_zeros(bit);
            const int64_t to = from_here + count_bits((chosen_here | edited_here) & (bit - 1));
            const TensorRow u = tensor_row(v.table, part.tensor);  // again: t would take registers all the while
            const int64_t i = (c - u.first_chunk) * v.chunk + int64_t(mine) * kRow + p;
            unchanged += edit_chosen<Key>(u, i, v.scale, [&](auto x) { put(to, bits_of(x)); });
            ++kept;
            store(indices, to, u.first + i);
        }
    }
    flush();
    // Fewer than m were eligible: -1 and 0 fill up.
    const int64_t used = load(v.tile_sums, (v.num_chunks + kStep - 1) / kStep);
    for (int64_t i = used + block() * kThreads + thread(); i < v.record; i += blocks() * kThreads) {
        store(indices, i, int64_t(-1));
        put(i, 0);
    }
}

// Puts back what the sweep has edited: the call is refused.
template <class Key, class Old>
PSE_KERNEL(kThreads, kAnyOccupancy)
topm_restore(View<Key> v) {
    after_earlier_launches();
    const Global<Old> journal = simt::global<Old>(v.journal, v.journal_size);
    const int64_t end = v.num_chunks * (block() + 1) / blocks();
    for (int64_t c = v.num_chunks * block() / blocks(); c < end; ++c) {
        TensorRow t;
        const Part part = part_of(v, c, &t);
        if (load(v.group(part.group), kSamples) == 0 || load(v.state_of(part.group), kPath) == kSpoilt) continue;
        for (int at = warp() * kRow; at < part.n; at += kStep) {
            const int64_t mark = load(v.marks, row_of(t, part.tensor, part.local + at));
            for (int i = lane(); i < entries_of_mark(mark); i += kWarp) {
                const int64_t slot = slot_of_mark(mark) + i;
                put_param(t, part.local + at + load(v.journal_places, slot), load(journal, slot));
            }
        }
    }
}

}  // namespace cuda
}  // namespace pse
