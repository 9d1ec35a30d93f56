// 2 of projection.cu: the partial sums of the blocks of columns become the Gram matrix.
#pragma once
#include "cuda/projection_recur.cuh"

namespace pse {
namespace cuda {

constexpr int kJoinThreads = 256;

// join_lanes() for 8 neighbouring threads, a lane each: every one of them gets the result.
PSE_DEVICE double join_lanes_of_threads(double x) {
    x = add_rn(x, shuffle_xor(x, 4));
    x = add_rn(x, shuffle_xor(x, 2));
    return add_rn(x, shuffle_xor(x, 1));
}

// A column of sums, in order from 0. As many loads as half a run has blocks wait for memory once, the last ones too.
PSE_DEVICE double sum_in_order(Global<const double> sums, int64_t count, int stride) {
    constexpr int kAtOnce = int(kGramRun) / 2;
    double sum = 0.0;
    for (int64_t i = 0; i < count; i += kAtOnce) {
        const int here = int(smaller(int64_t(kAtOnce), count - i));
        const Global<const double> from = sums + i * stride;
        double part[kAtOnce];
        PSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) part[u] = u < here ? load(from, u * stride) : 0.0;
        PSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u)
            if (u < here) sum = add_rn(sum, part[u]);
    }
    return sum;
}

PSE_DEVICE void join_run(const Arrays& a, int64_t group, int64_t run, int64_t pair) {
    const int64_t first = run * kGramRun, count = smaller(kGramRun, a.blocks - first);
    store(a.run_sums, (group * a.runs + run) * a.pairs + pair,
          sum_in_order(a.partials + ((group * a.blocks + first) * a.pairs + pair), count, int(a.pairs)));
}

PSE_DEVICE void join_runs(const Arrays& a, int64_t group, int64_t pair) {
    const int64_t i = row_of_pair(pair), j = pair - pairs_of(i);
    const double sum = sum_in_order(a.run_sums + (group * a.runs * a.pairs + pair), a.runs, int(a.pairs));
    store(a.gram, (group * a.k + i) * a.k + j, sum);
    store(a.gram, (group * a.k + j) * a.k + i, sum);
}

// The end of a thread block that has added its share of a run: `shares` of them make the run.
PSE_DEVICE void join_inline(const Arrays& a, int64_t group, int64_t run, int64_t shares PSE_CALLER) {
    if (!last_block(a.tickets, group * a.tickets_per_group + run, uint32_t(shares))) return;
    for (int64_t pair = thread(); pair < a.pairs; pair += threads()) join_run(a, group, run, pair);
    if (a.runs > 1 && !last_block(a.tickets, (group + 1) * a.tickets_per_group - 1, uint32_t(a.runs))) return;
    for (int64_t pair = thread(); pair < a.pairs; pair += threads()) join_runs(a, group, pair);
    if (!a.project) return;
    sync_block();
    recur_inline(a, group);
}

PSE_KERNEL(kJoinThreads) join_pairs(Arrays a) {
    after_earlier_launches();
    const int64_t chunks = divide_up(a.pairs, kJoinThreads), chunk = block() % chunks;
    const int64_t run = block() / chunks % a.runs, group = block() / chunks / a.runs;
    const int64_t pair = chunk * kJoinThreads + thread();
    if (pair < a.pairs) join_run(a, group, run, pair);
    if (!last_block(a.tickets, group * a.tickets_per_group + chunk, uint32_t(a.runs))) return;
    if (pair < a.pairs) join_runs(a, group, pair);
}

}  // namespace cuda
}  // namespace pse
