// Kernels with one bug each, which the harness must catch, beside their sound twins, which it must let pass.
#include "cuda/simt.cuh"
//
#include "planted.h"

namespace pse {
namespace simt {

constexpr int kThreads = 64;
constexpr int64_t kSize = 256;  // of the buffer that every kernel gets

PSE_KERNEL(kThreads) reverse_with_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), load(data, thread()));
    sync_block();
    store(data, thread(), load(tile, kThreads - 1 - thread()));
}
PSE_KERNEL(kThreads) reverse_without_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), load(data, thread()));
    sync_warp();  // not enough: the other warp's part
    store(data, thread(), load(tile, kThreads - 1 - thread()));
}
PSE_KERNEL(kThreads) shift_in_a_warp(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), load(data, thread()));
    sync_warp();
    store(data, thread(), load(tile, thread() ^ 1));
}
PSE_KERNEL(kThreads) shift_without_warp_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), load(data, thread()));
    store(data, thread(), load(tile, thread() ^ 1));
}
PSE_KERNEL(kThreads) reuse_without_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    for (int round = 0; round < 2; ++round) {
        store(tile, thread(), load(data, thread()) + round);
        sync_block();
        store(data, thread(), load(tile, kThreads - 1 - thread()));
        // missing: the next round writes what others still read
    }
}
PSE_KERNEL(kThreads) barrier_in_a_branch(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() < 32) sync_block();
    store(data, thread(), 1);
}
PSE_KERNEL(kThreads) two_barriers_that_differ(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() < 32)
        sync_block();
    else
        sync_block();
    store(data, thread(), 1);
}
PSE_KERNEL(kThreads) shuffle_in_a_branch(Global<int32_t> data) {
    after_earlier_launches();
    int32_t x = load(data, thread());
    if (lane() < 16) x = shuffle(x, 0);
    store(data, thread(), x);
}
PSE_DEVICE int32_t plus_the_first(int32_t x PSE_CALLER) { return x + shuffle(x, 0); }
PSE_DEVICE void wait_for_all(int PSE_CALLER) { sync_block(); }
PSE_KERNEL(kThreads) two_calls_of_a_shuffle(Global<int32_t> data) {
    after_earlier_launches();
    int32_t x = load(data, thread());
    if (lane() < 16)
        x = plus_the_first(x);
    else
        x = plus_the_first(-x);
    store(data, thread(), x);
}
PSE_KERNEL(kThreads) two_calls_of_a_barrier(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() < 32)
        wait_for_all(0);
    else
        wait_for_all(1);
    store(data, thread(), 1);
}
// Of the matrix that holds 0, 1, 2, ... row by row: its first 16 rows of 4 by its first 8, transposed.
PSE_KERNEL(kThreads) product_of_tiles(Global<int32_t> data) {
    after_earlier_launches();
    if (warp() != 0) return;
    double d[4] = {};
    multiply_add_tiles(d, lane(), 32 + lane(), lane());
    for (int e = 0; e < 4; ++e) store(data, (lane() / 4 + e / 2 * 8) * 8 + lane() % 4 * 2 + e % 2, int32_t(d[e]));
}
PSE_KERNEL(kThreads) product_of_half_a_tile(Global<int32_t> data) {
    after_earlier_launches();
    double d[4] = {};
    if (lane() < 16) multiply_add_tiles(d, lane(), lane(), lane());
    store(data, thread(), int32_t(d[0]));
}
PSE_KERNEL(kThreads) early_return(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() == 5) return;
    sync_block();
    store(data, thread(), 1);
}
PSE_KERNEL(kThreads) off_by_one(Global<int32_t> data) {
    after_earlier_launches();
    store(data, kSize - kThreads + 1 + thread(), 1);
}
PSE_KERNEL(kThreads) before_the_first(Global<int32_t> data) {
    after_earlier_launches();
    store(data, load(data, thread() - 1), 1);
}
PSE_KERNEL(kThreads) shared_off_by_one(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread() + 1, load(data, thread()));
}
PSE_KERNEL(kThreads) does_not_wait_for_earlier_launches(Global<int32_t> data) {
    store(data, thread(), 1);
    after_earlier_launches();
}
PSE_KERNEL(kThreads) leaves_before_earlier_launches(Global<int32_t> data) {
    if (thread() == 5) return;
    after_earlier_launches();
    store(data, thread(), 1);
}
// A function of csrc/core: it knows no kernel, and is checked as if it did.
template <class Row>
PSE_HD void add_to_each(Row row, int count, int32_t x) {
    for (int i = 0; i < count; ++i) row[i] = row[i] + x;
}
PSE_KERNEL(kThreads) core_function(Global<int32_t> data) {
    after_earlier_launches();
    if (block() == 0 && thread() == 0) add_to_each(elements(data), kThreads, 5);
}
PSE_KERNEL(kThreads) core_function_off_by_one(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), load(data, thread()));
    sync_block();
    if (thread() == 0) add_to_each(elements(tile), kThreads + 1, 5);
}
PSE_KERNEL(kThreads) core_function_without_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), load(data, thread()));
    if (thread() == 0) add_to_each(elements(tile), kThreads, 5);
}
PSE_KERNEL(kThreads) crooked_vector(Global<int32_t> data) {
    after_earlier_launches();
    store(data, thread(), load_vector<4>(data, 1).at[0]);
}
PSE_KERNEL(kThreads) unwritten_read(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    if (thread() != 7) store(tile, thread(), 1);
    sync_block();
    store(data, thread(), load(tile, thread()));
}
PSE_KERNEL(kThreads) unwritten_counter(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, counter, 1);
    atomic_add(counter, 0, 1);  // nobody has set it to 0
    store(data, thread(), 1);
}
// Sixteen threads copy four elements each.
PSE_DEVICE void copy_tile(Shared<int32_t> tile, Global<const int32_t> data) {
    if (thread() < kThreads / 4) copy_async<4>(tile, thread() * 4, data, thread() * 4);
    commit_copies();
}
PSE_KERNEL(kThreads) reverse_by_copies(Global<int32_t> data) {
    after_earlier_launches();
    PSE_COPIED_SHARED(int32_t, tile, 2 * kThreads);
    copy_tile(tile, data);
    copy_tile(tile + kThreads, data);
    wait_copies<1>();
    sync_block();
    const int32_t first = load(tile, kThreads - 1 - thread());
    wait_copies<0>();
    sync_block();
    store(data, thread(), first + load_vector<2>(tile, kThreads + thread() / 2 * 2).at[0]);
}
PSE_KERNEL(kThreads) copies_not_waited_for(Global<int32_t> data) {
    after_earlier_launches();
    PSE_COPIED_SHARED(int32_t, tile, 2 * kThreads);
    copy_tile(tile, data);
    copy_tile(tile + kThreads, data);
    wait_copies<1>();  // one group too few
    sync_block();
    store(data, thread(), load(tile, kThreads + thread()));
    wait_copies<0>();
}
PSE_KERNEL(kThreads) copies_without_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_COPIED_SHARED(int32_t, tile, kThreads);
    copy_tile(tile, data);
    wait_copies<0>();  // not enough: the other threads' copies
    store(data, kThreads + thread(), load(tile, thread()));
}
PSE_KERNEL(kThreads) copies_over_what_is_read(Global<int32_t> data) {
    after_earlier_launches();
    PSE_COPIED_SHARED(int32_t, tile, kThreads);
    for (int round = 0; round < 2; ++round) {
        copy_tile(tile, data);
        wait_copies<0>();
        sync_block();
        store(data, kThreads + thread(), load(tile, kThreads - 1 - thread()));
        // missing: the next round copies to what others still read
    }
}
PSE_KERNEL(kThreads) copies_left_behind(Global<int32_t> data) {
    after_earlier_launches();
    PSE_COPIED_SHARED(int32_t, tile, kThreads);
    sync_block();
    copy_tile(tile, data);
}
PSE_KERNEL(kThreads) crooked_copy(Global<int32_t> data) {
    after_earlier_launches();
    PSE_COPIED_SHARED(int32_t, tile, kThreads);
    copy_async<4>(tile, 2, Global<const int32_t>(data), 0);
}
PSE_KERNEL(kThreads) two_blocks_write(Global<int32_t> data) {
    after_earlier_launches();
    store(data, thread(), int32_t(block()));
}
PSE_KERNEL(kThreads) a_block_reads_another_s(Global<int32_t> data) {
    after_earlier_launches();
    store(data, block() * kThreads + thread(), 1);
    const int32_t x = load(data, (block() + 1) % 2 * kThreads + thread());
    store(data, 2 * kThreads + block() * kThreads + thread(), x);
}
PSE_KERNEL(kThreads) plain_read_of_a_counter(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() == 0) atomic_add(data, 0, 1);
    if (thread() == 0 && load(data, 0) > 0) store(data, 1 + block(), 1);
}
PSE_KERNEL(kThreads) count_with_atomics(Global<int32_t> data) {
    after_earlier_launches();
    atomic_add(data, 0, 1);
}
PSE_KERNEL(kThreads) sum_by_the_last_block(Global<int32_t> data, Global<uint32_t> tickets) {
    after_earlier_launches();
    store(data, block() * kThreads + thread(), 1);
    if (!last_block(tickets, 0, uint32_t(blocks()))) return;
    int32_t sum = 0;
    for (int64_t i = thread(); i < blocks() * kThreads; i += kThreads) sum += load(data, i);
    store(data, 3 * kThreads + thread(), sum);
}
PSE_KERNEL(kThreads) sum_by_a_block_that_does_not_wait(Global<int32_t> data, Global<uint32_t> tickets) {
    after_earlier_launches();
    store(data, block() * kThreads + thread(), 1);
    last_block(tickets, 0, uint32_t(blocks()));
    if (block() != 0) return;
    int32_t sum = 0;
    for (int64_t i = thread(); i < blocks() * kThreads; i += kThreads) sum += load(data, i);
    store(data, 3 * kThreads + thread(), sum);
}
PSE_KERNEL(kThreads) late_write(Global<int32_t> data, Global<uint32_t> tickets) {
    after_earlier_launches();
    const bool last = last_block(tickets, 0, uint32_t(blocks()));
    if (block() == 1 && thread() == 0) store(data, 0, 1);  // after it has come: the last block need not see it
    if (last) store(data, kThreads + thread(), load(data, 0));
}
PSE_KERNEL(kThreads) dirty_ticket(Global<int32_t> data, Global<uint32_t> tickets) {
    after_earlier_launches();
    if (last_block(tickets, 0, uint32_t(blocks()))) store(data, thread(), 1);
}
// Block 0 expects block 1's mark: right in one order of the blocks, wrong in another.
PSE_KERNEL(kThreads) depends_on_block_order(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() == 0) store(data, block(), atomic_add(data, kThreads, 1));
}

// ---- clusters: each block gives its neighbour, of the next rank, what it has in shared memory

PSE_DEVICE int next_rank() { return (cluster_rank() + 1) % cluster_size(); }

PSE_KERNEL(kThreads) neighbours(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), int32_t(100 * block()) + thread());
    cluster_sync();
    store(data, block() * kThreads + thread(), load(of_rank(tile, next_rank()), kThreads - 1 - thread()));
    cluster_sync();
}
PSE_KERNEL(kThreads) neighbours_in_turns(Global<int32_t> data) {
    after_earlier_launches();  // two arrays: a barrier a round is enough
    PSE_SHARED(int32_t, tile, 2 * kThreads);
    int32_t x = int32_t(block());
    for (int round = 0; round < 4; ++round) {
        const int at = round % 2 * kThreads + thread();
        store(tile, at, x);
        cluster_sync();
        x = load(of_rank(tile, next_rank()), at);
    }
    store(data, block() * kThreads + thread(), x);
    cluster_sync();
}
PSE_KERNEL(kThreads) blocks_of_a_cluster_through_memory(Global<int32_t> data) {
    after_earlier_launches();
    store(data, block() * kThreads + thread(), int32_t(block()));
    cluster_sync();
    const int64_t next = block() - cluster_rank() + next_rank();
    const int32_t x = load(data, next * kThreads + thread());
    cluster_sync();
    store(data, block() * kThreads + thread(), x);
}
PSE_KERNEL(kThreads) launched_tile(Global<int32_t> data) {
    after_earlier_launches();
    PSE_LAUNCHED_SHARED(int32_t, tile);
    store(tile, thread(), int32_t(block()));
    cluster_sync();
    store(data, block() * kThreads + thread(), load(of_rank(tile, next_rank()), thread()));
    cluster_sync();
}
PSE_KERNEL(kThreads) launched_tile_off_by_one(Global<int32_t> data) {
    after_earlier_launches();
    PSE_LAUNCHED_SHARED(int32_t, tile);
    store(tile, thread() + 1, load(data, thread()));
}
PSE_KERNEL(kThreads) neighbours_without_barrier(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), 0);
    cluster_sync();
    store(tile, thread(), int32_t(block()));
    sync_block();  // not enough: the other blocks
    store(data, block() * kThreads + thread(), load(of_rank(tile, next_rank()), thread()));
    cluster_sync();
}
PSE_KERNEL(kThreads) neighbours_overwritten(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    int32_t x = int32_t(block());
    for (int round = 0; round < 2; ++round) {
        store(tile, thread(), x);
        cluster_sync();
        x = load(of_rank(tile, next_rank()), thread());
        sync_block();  // not enough: the next round writes what others still read
    }
    store(data, block() * kThreads + thread(), x);
    cluster_sync();
}
PSE_KERNEL(kThreads) leaves_before_it_is_read(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), int32_t(block()));
    cluster_sync();
    store(data, block() * kThreads + thread(), load(of_rank(tile, next_rank()), thread()));
}
PSE_KERNEL(kThreads) rank_out_of_range(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    store(tile, thread(), int32_t(block()));
    cluster_sync();
    store(data, block() * kThreads + thread(), load(of_rank(tile, cluster_rank() + 1), thread()));
    cluster_sync();
}
PSE_KERNEL(kThreads) two_cluster_barriers_that_differ(Global<int32_t> data) {
    after_earlier_launches();
    if (cluster_rank() == 0)
        cluster_sync();
    else
        cluster_sync();
    store(data, block() * kThreads + thread(), 1);
}
PSE_KERNEL(kThreads) cluster_barrier_of_some(Global<int32_t> data) {
    after_earlier_launches();
    if (cluster_rank() != 1) cluster_sync();
    store(data, block() * kThreads + thread(), 1);
}
PSE_KERNEL(kThreads) barriers_of_two_kinds(Global<int32_t> data) {
    after_earlier_launches();
    if (thread() < 32)
        cluster_sync();
    else
        sync_block();
    store(data, block() * kThreads + thread(), 1);
}
PSE_KERNEL(kThreads) unwritten_remote_read(Global<int32_t> data) {
    after_earlier_launches();
    PSE_SHARED(int32_t, tile, kThreads);
    if (cluster_rank() != 2 || thread() != 7) store(tile, thread(), 1);
    cluster_sync();
    store(data, block() * kThreads + thread(), load(of_rank(tile, next_rank()), thread()));
    cluster_sync();
}
PSE_KERNEL(kThreads) other_cluster_through_memory(Global<int32_t> data) {
    after_earlier_launches();
    store(data, block() * kThreads + thread(), 1);
    cluster_sync();
    const int32_t x = load(data, (block() + 1) % blocks() * kThreads + thread());
    cluster_sync();
    store(data, 0, x);
}

static const Target kHere = {0, nullptr};

std::vector<std::string> planted_names() {
    return {"reverse_with_barrier",
            "reverse_without_barrier",
            "shift_in_a_warp",
            "shift_without_warp_barrier",
            "reuse_without_barrier",
            "barrier_in_a_branch",
            "two_barriers_that_differ",
            "shuffle_in_a_branch",
            "two_calls_of_a_shuffle",
            "two_calls_of_a_barrier",
            "product_of_tiles",
            "product_of_half_a_tile",
            "early_return",
            "off_by_one",
            "before_the_first",
            "shared_off_by_one",
            "does_not_wait_for_earlier_launches",
            "leaves_before_earlier_launches",
            "core_function",
            "core_function_off_by_one",
            "core_function_without_barrier",
            "crooked_vector",
            "unwritten_read",
            "unwritten_counter",
            "reverse_by_copies",
            "copies_not_waited_for",
            "copies_without_barrier",
            "copies_over_what_is_read",
            "copies_left_behind",
            "crooked_copy",
            "two_blocks_write",
            "a_block_reads_another_s",
            "plain_read_of_a_counter",
            "count_with_atomics",
            "sum_by_the_last_block",
            "sum_by_a_block_that_does_not_wait",
            "late_write",
            "dirty_ticket",
            "depends_on_block_order",
            "neighbours",
            "neighbours_in_turns",
            "blocks_of_a_cluster_through_memory",
            "launched_tile",
            "launched_tile_off_by_one",
            "neighbours_without_barrier",
            "neighbours_overwritten",
            "leaves_before_it_is_read",
            "rank_out_of_range",
            "two_cluster_barriers_that_differ",
            "cluster_barrier_of_some",
            "barriers_of_two_kinds",
            "unwritten_remote_read",
            "other_cluster_through_memory"};
}

std::vector<int32_t> planted(const std::string& name) {
    std::vector<int32_t> memory(kSize);
    for (int64_t i = 0; i < kSize; ++i) memory[size_t(i)] = int32_t(i % kThreads);
    uint32_t ticket = 0;
    const Global<int32_t> data = global<int32_t>(memory.data(), kSize);
    const Global<uint32_t> tickets = global<uint32_t>(&ticket, 1);
#define PSE_ONE(kernel, blocks) \
    if (name == #kernel) launch(#kernel, kHere, blocks, kThreads, kernel, data)
#define PSE_TWO(kernel, blocks) \
    if (name == #kernel) launch(#kernel, kHere, blocks, kThreads, kernel, data, tickets)
#define PSE_CLUSTER(kernel, clusters, size) \
    if (name == #kernel) launch_clusters(#kernel, kHere, clusters, size, kThreads, kThreads * 4, kernel, data)
    PSE_ONE(reverse_with_barrier, 1);
    PSE_ONE(reverse_without_barrier, 1);
    PSE_ONE(shift_in_a_warp, 1);
    PSE_ONE(shift_without_warp_barrier, 1);
    PSE_ONE(reuse_without_barrier, 1);
    PSE_ONE(barrier_in_a_branch, 1);
    PSE_ONE(two_barriers_that_differ, 1);
    PSE_ONE(shuffle_in_a_branch, 1);
    PSE_ONE(two_calls_of_a_shuffle, 1);
    PSE_ONE(two_calls_of_a_barrier, 1);
    PSE_ONE(product_of_tiles, 1);
    PSE_ONE(product_of_half_a_tile, 1);
    PSE_ONE(early_return, 1);
    PSE_ONE(off_by_one, 1);
    PSE_ONE(before_the_first, 1);
    PSE_ONE(shared_off_by_one, 1);
    PSE_ONE(does_not_wait_for_earlier_launches, 1);
    PSE_ONE(leaves_before_earlier_launches, 1);
    PSE_ONE(core_function, 1);
    PSE_ONE(core_function_off_by_one, 1);
    PSE_ONE(core_function_without_barrier, 1);
    PSE_ONE(crooked_vector, 1);
    PSE_ONE(unwritten_read, 1);
    PSE_ONE(unwritten_counter, 1);
    PSE_ONE(reverse_by_copies, 1);
    PSE_ONE(copies_not_waited_for, 1);
    PSE_ONE(copies_without_barrier, 1);
    PSE_ONE(copies_over_what_is_read, 1);
    PSE_ONE(copies_left_behind, 1);
    PSE_ONE(crooked_copy, 1);
    PSE_ONE(two_blocks_write, 2);
    PSE_ONE(a_block_reads_another_s, 2);
    PSE_ONE(plain_read_of_a_counter, 2);
    PSE_ONE(count_with_atomics, 3);
    PSE_TWO(sum_by_the_last_block, 3);
    PSE_TWO(sum_by_a_block_that_does_not_wait, 3);
    PSE_TWO(late_write, 3);
    PSE_ONE(depends_on_block_order, 3);
    if (name == "dirty_ticket") {
        ticket = 7;
        PSE_TWO(dirty_ticket, 2);
    }
    PSE_CLUSTER(neighbours, 1, 4);
    PSE_CLUSTER(neighbours_in_turns, 1, 4);
    PSE_CLUSTER(blocks_of_a_cluster_through_memory, 2, 2);
    PSE_CLUSTER(launched_tile, 2, 2);
    PSE_CLUSTER(launched_tile_off_by_one, 2, 2);
    PSE_CLUSTER(neighbours_without_barrier, 1, 4);
    PSE_CLUSTER(neighbours_overwritten, 1, 4);
    PSE_CLUSTER(leaves_before_it_is_read, 1, 4);
    PSE_CLUSTER(rank_out_of_range, 1, 4);
    PSE_CLUSTER(two_cluster_barriers_that_differ, 1, 4);
    PSE_CLUSTER(cluster_barrier_of_some, 1, 4);
    PSE_CLUSTER(barriers_of_two_kinds, 1, 4);
    PSE_CLUSTER(unwritten_remote_read, 1, 4);
    PSE_CLUSTER(other_cluster_through_memory, 2, 2);
#undef PSE_CLUSTER
#undef PSE_ONE
#undef PSE_TWO
    memory.push_back(int32_t(ticket));
    return memory;
}

}  // namespace simt
}  // namespace pse
