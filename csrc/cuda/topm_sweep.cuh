// 2 of topm.cu: one pass over the tensors counts what A holds (one_pass: edits it, and notes it where a record is
// wanted) and collects what B holds beyond A.
#pragma once
#include "cuda/topm_journal.cuh"
#include "cuda/topm_rank.cuh"

namespace pse {
namespace cuda {

// What the counts say about a group that has been swept. One thread.
template <class Key>
PSE_DEVICE void decide(const View<Key>& v, int64_t g) {
    const Global<int64_t> state = v.state_of(g);
    const Global<const int64_t> group = v.group(g);
    const int64_t available = load(group, kSize) - load(state, kExcluded), wanted = load(group, kM);
    const int64_t m = wanted < available ? wanted : available;
    const int64_t above = load(state, kAbove), within = load(state, kWithin), need = m - above;
    const Bound<Key> a = bound_at<Key>(state, kAKey), b = bound_at<Key>(state, kBKey);
    const int64_t first = load(group, kGroupTensor), end = first + load(group, kGroupTensors);
    Path path;
    Problem<Key> x = any_key<Key>(need, within);
    x.low = int64_t(KeyTraits<Key>::none) - int64_t(a.key);
    if (m == 0) {
        path = kSettled;  // K stays as it was opened: nothing
        x.open = false;
    } else if (need == 0 && a.key != 0) {
        path = kSettled;
        x.open = false;
        put_bound(state, kKKey, a);
        for (int64_t i = first; i < end; ++i) put_threshold(v, i, key_score(a.key));
    } else if (need > 0 && need <= within && within <= load(group, kPoolCapacity)) {
        path = kPool;
        if (b.key != 0) x.high = int64_t(KeyTraits<Key>::none) - int64_t(b.key);
        if (a.key == b.key) {  // a tie wider than the bracket
            x.by_index = true;
            x.key = a.key;
            x.low = a.index + 1;
            x.high = b.index;
        }
    } else if (v.one_pass == 0) {
        path = kExact;
        x = any_key<Key>(m, available);
    } else if (need > 0) {
        path = kRest;
        x.count = available - above;
    } else {
        path = kSpoilt;
        x.open = false;
        for (int64_t i = first; i < end; ++i) store(v.nonfinite, i, int64_t(-1));
    }
    put_problem(v.problem_of(g, kK), x);
    store(state, kSwept, int64_t(1));
    store(state, kPath, int64_t(path));
}

enum Sweep { kLook, kEdit, kEditAndNote };

// Candidates that a block holds back: 2 % of a chunk is 330. Beside the journal of 64-bit params there is room for
// less.
template <class M, Sweep kSweep>
constexpr int kStage = IsWide<M>::value && kSweep == kEditAndNote ? 512 : 1024;

// Blocks per processor that the registers allow without spilling, on any architecture.
template <class M, Sweep kSweep>
constexpr int kSweepers = 2;
template <class T>
constexpr int kSweepers<Same<T>, kLook> = 3;
template <>
constexpr int kSweepers<Same<bf16_t>, kEdit> = 3;
template <class R, class K>
constexpr int kSweepers<Mixed<R, K>, kEditAndNote> = kAnyOccupancy;

template <class M, Sweep kSweep>
PSE_KERNEL(kThreads, (kSweepers<M, kSweep>))
topm_sweep(View<typename M::Key> v) {
    after_earlier_launches();
    using Key = typename M::Key;
    constexpr int kHeld = kStage<M, kSweep>;
    PSE_SHARED(Key, stage_keys, kHeld);
    PSE_SHARED(int64_t, stage_indices, kHeld);
    PSE_SHARED(uint32_t, staged, 1);
    PSE_SHARED(int64_t, slot, 1);
    PSE_SHARED(int, sums, kWarps);
    using Old = typename OldBits<M>::type;
    constexpr int kNoted = kSweep == kEditAndNote ? kWarps * kRow : 1;
    PSE_SHARED(uint8_t, noted_places, kNoted);
    PSE_SHARED(Old, noted_old, kNoted);
    PSE_COPIED_SHARED(Old, noted_row, kNoted);
    const int here = kSweep == kEditAndNote ? warp() * kRow : 0;
    Journal<Old> journal(noted_places + here, noted_old + here, noted_row + here);
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
        if (kSweep != kLook) add_count(v.kept, current, above_count);
        if (kSweep != kLook) add_count(v.unchanged, current, unchanged);
        if constexpr (kSweep == kEditAndNote) journal.close(v, g);
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
            [[maybe_unused]] const auto scale = v.template scale_as<typename decltype(source)::Real>();
            for_each_step(
                source, t, part.local, part.n,
                [&]([[maybe_unused]] auto how, int at, [[maybe_unused]] int mine, int none, const auto& entries) {
                    excluded += none;
                    const uint32_t above = held(source, entries, a, at);
                    above_here += count_bits(above);
                    if constexpr (kSweep == kEditAndNote) {
                        // A row beyond the end is another chunk's.
                        if (ballot(mine > 0) != 0)
                            journal.open_row(v, part.group, row_of(t, part.tensor, part.local + at), above);
                    }
                    if (kSweep != kLook && ballot(above != 0) != 0) {
                        const auto edit = [&](const auto& keep) {
                            return edit_eight(how, source, t, part.local + at, above, entries.delta, scale, keep);
                        };
                        if constexpr (kSweep == kEditAndNote) {
                            unchanged += edit(journal);
                            journal.close_row();
                        } else {
                            unchanged += edit(KeepNothing{});
                        }
                    }
                    uint32_t band = held(source, entries, b, at) & ~above;
                    for (; band != 0; band &= band - 1) {
                        const int j = lowest_bit(band);
                        const Key key = signed_key(source, entries, j);
                        const int64_t index = part.index + at + j;
                        const uint32_t place = atomic_add(staged, 0, 1u);
                        if (place < kHeld) {
                            store(stage_keys, int(place), key);
                            store(stage_indices, int(place), index);
                        } else {  // a chunk full of candidates
                            const int64_t free = atomic_add(state, kWithin, int64_t(1));
                            if (free < room) store(v.pool_keys, pool + free, key);
                            if (free < room) store(v.pool_indices, pool + free, index);
                        }
                    }
                });
        });
        above_count += above_here;
        sync_block();
        const uint32_t all = load(staged, 0);
        const int full = int(all < kHeld ? all : kHeld);
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
    if (!last_block(v.tickets, v.launch_ticket(), uint32_t(blocks()))) return;
    for (int64_t g = thread(); g < v.num_groups; g += kThreads) {
        const int64_t path = load(v.state_of(g), kPath);
        if (path == kBracket) decide(v, g);
    }
}

}  // namespace cuda
}  // namespace pse
