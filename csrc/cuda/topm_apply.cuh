// 4 of topm.cu: edit or list what K holds. A record is of topm_journal.cuh.
#pragma once
#include "cuda/topm_journal.cuh"

namespace pse {
namespace cuda {

// For a record or a list: where the entries of each chunk start, within a tile of kStep chunks, and where the tiles
// start. For a record some blocks more come to choose_walk().
template <class M>
PSE_KERNEL(kThreads, kAnyOccupancy)
topm_scan_chunks(View<typename M::Key> v) {
    after_earlier_launches();
    using Key = typename M::Key;
    const int64_t tiles = (v.num_chunks + kStep - 1) / kStep;
    if (block() >= tiles) {
        choose_walk<M>(v, block() - tiles, blocks() - tiles);
        return;
    }
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
    if (!last_block(v.tickets, v.launch_ticket(), uint32_t(tiles))) return;
    int64_t before = 0;
    for (int64_t tile = 0; tile < tiles; tile += kThreads) {
        const bool inside = tile + thread() < tiles;
        const int64_t here = inside ? load(v.tile_sums, tile + thread()) : 0;
        const int64_t start = before + scan_block(sums, here, &total);
        if (inside) store(v.tile_sums, tile + thread(), start);
        before += total;
    }
    if (thread() == 0) store(v.tile_sums, tiles, before);
}

enum Output { kEditOnly, kList };

// Blocks per processor that the registers allow without spilling, on any architecture.
template <class M, Output kOutput>
constexpr int kEditors = 2;
template <class T, Output kOutput>
constexpr int kEditors<Same<T>, kOutput> = sizeof(T) == 2 ? 4 : 3;

template <class M, Output kOutput>
PSE_KERNEL(kThreads, (kEditors<M, kOutput>))
topm_apply(View<typename M::Key> v) {
    after_earlier_launches();
    using Key = typename M::Key;
    PSE_SHARED(int32_t, sums, kWarps);
    int64_t current = -1;
    int kept = 0, unchanged = 0;
    const auto flush = [&] {
        if (current < 0) return;
        add_count(v.kept, current, kept);
        if (kOutput == kEditOnly) add_count(v.unchanged, current, unchanged);
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
        if (v.one_pass != 0 && !is_exact(path)) {
            c = last_chunk_of(v, part.group);
            continue;
        }
        const Edge<Key> k = edge_of(bound_at<Key>(state, kKKey), part.index);
        if (k.key == nothing<Key>().key) continue;
        const Edge<Key> done = edge_of(bound_at<Key>(state, kAKey), part.index);  // of use in kRest
        int64_t place = kOutput == kEditOnly ? 0 : load(v.tile_sums, c / kStep) + load(v.greater, c);
        with_source(M{}, t, [&](auto source) {
            [[maybe_unused]] const auto scale = v.template scale_as<typename decltype(source)::Real>();
            for_each_step(
                source, t, part.local, part.n, [&]([[maybe_unused]] auto how, int at, int, int, const auto& entries) {
                    uint32_t chosen = held(source, entries, k, at);
                    if (path == kRest) chosen &= ~held(source, entries, done, at);
                    kept += count_bits(chosen);
                    if constexpr (kOutput == kList) {
                        int32_t total;
                        int64_t slot = place + scan_block(sums, int32_t(count_bits(chosen)), &total);
                        place += total;
                        for (uint32_t rest = chosen; rest != 0; rest &= rest - 1) {
                            const int j = lowest_bit(rest);
                            const int64_t i = part.local + at + j;
                            store(simt::global<int64_t>(v.indices, v.record), slot, i);
                            if constexpr (sizeof(Key) == 8)
                                store(simt::global<double>(v.values, v.record), slot, double(pick(entries.delta, j)));
                            else
                                store(simt::global<float>(v.values, v.record), slot, pick(entries.delta, j));
                            ++slot;
                        }
                    }
                    if constexpr (kOutput == kEditOnly) {
                        if (ballot(chosen != 0) != 0)
                            unchanged += edit_eight(how, source, t, part.local + at, chosen, entries.delta, scale,
                                                    KeepNothing{});
                    }
                });
        });
    }
    flush();
}

}  // namespace cuda
}  // namespace pse
