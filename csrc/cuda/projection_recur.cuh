// 3 of projection.cu: PCGrad on k-vectors, in fp64. Few objectives in the block that has joined the Gram matrix, many
// by a launch of its own.
#pragma once
#include "cuda/projection_view.cuh"

namespace pse {
namespace cuda {

constexpr int kRecurThreads = 128;

template <class Order>
PSE_DEVICE void fill_order(const Arrays& a, int64_t group, int objective, Order order) {
    const int others = int(a.k) - 1;
    if (a.mode == ProjectionOrder::random) return draw_order(a.seed, uint64_t(group), objective, a.k, order);
    for (int n = 0; n < others; ++n)
        order[n] = a.mode == ProjectionOrder::given ? int32_t(load(a.order, int64_t(objective) * others + n))
                                                    : (n < objective ? n : n + 1);
}

// A factor of exactly 1 changes no bit: without weights the sums are those of the core's null pointer.
PSE_DEVICE double weight_of(const Arrays& a, int64_t group, int objective) {
    return a.weights != nullptr ? load(a.weights, group * a.k + objective) : 1.0;
}

// Coefficients of the result, of the objectives that take part and packed, and the group's flag. By the whole block.
template <class Projected>
PSE_DEVICE void combine_projected(const Arrays& a, int64_t group, Shared<double> weights, Shared<double> squared_norms,
                                  Projected projected) {
    const int k = int(a.k);
    for (int m = thread(); m < k; m += threads()) {
        int place = 0, count = 0;
        bool finite = true;
        for (int i = 0; i < k; ++i) {
            const double weight = load(weights, i), norm = load(squared_norms, i);
            const bool part = weight != 0.0;
            place += part && i < m;
            count += part;
            finite = finite && (!part || (weight - weight == 0.0 && weight > 0.0 && norm - norm == 0.0));
        }
        if (m == 0) {
            store(a.finite, group, uint8_t(finite));
            store(a.active_count, group, int32_t(count));
        }
        if (load(weights, m) == 0.0) continue;
        store(a.active, group * k + place, int32_t(m));
        store(a.coefficients, group * k + place,
              combined_coefficient(projected, elements(weights), m, int64_t(k), a.mean));
    }
}

// Few objectives: a thread each, in the block that has joined the Gram matrix.
PSE_DEVICE void recur_inline(const Arrays& a, int64_t group) {
    PSE_SHARED(double, gram, kInline* kInline);
    PSE_SHARED(double, projected, kInline* kInline);
    PSE_SHARED(double, weights, kInline);
    PSE_SHARED(double, squared_norms, kInline);
    PSE_SHARED(int32_t, order, kInline* kInline);
    const int k = int(a.k);
    for (int e = thread(); e < k * k; e += threads()) {
        const double dot = load(a.gram, group * k * k + e);
        store(gram, e, dot);
        if (e % (k + 1) == 0) store(squared_norms, e / (k + 1), dot);
    }
    for (int i = thread(); i < k; i += threads()) store(weights, i, weight_of(a, group, i));
    sync_block();
    for (int i = thread(); i < k; i += threads()) {
        fill_order(a, group, i, elements(order + i * k));
        project_objective(elements(gram), elements(weights), elements(order + i * k), i, int64_t(k),
                          elements(projected + i * k));
    }
    sync_block();
    for (int e = thread(); e < k * k; e += threads()) store(a.projected, group * k * k + e, load(projected, e));
    combine_projected(a, group, weights, squared_norms, elements(projected));
}

// Many: a block each. Its threads fetch a row of the Gram matrix per step, the next one while thread 0 adds: the dot is
// one chain by definition.
PSE_KERNEL(kRecurThreads) recur_objective(Arrays a) {
    after_earlier_launches();
    PSE_SHARED(double, weights, kMostObjectives);
    PSE_SHARED(double, squared_norms, kMostObjectives);
    PSE_SHARED(double, row, kMostObjectives);
    PSE_SHARED(double, coefficients, kMostObjectives);
    PSE_SHARED(int32_t, order, kMostObjectives);
    const int k = int(a.k);
    const int64_t group = block() / k;
    const int objective = int(block() % k);
    const Global<double> gram = a.gram + group * k * k;
    for (int m = thread(); m < k; m += kRecurThreads) {
        store(weights, m, weight_of(a, group, m));
        store(squared_norms, m, load(gram, int64_t(m) * k + m));
        store(coefficients, m, m == objective ? 1.0 : 0.0);
    }
    if (thread() == 0) fill_order(a, group, objective, elements(order));
    sync_block();
    double fetched[kMostObjectives / kRecurThreads] = {};
    const auto fetch_row = [&](int step) {
        PSE_UNROLL
        for (int u = 0; u < kMostObjectives / kRecurThreads; ++u) {
            const int m = thread() + u * kRecurThreads;
            if (step < k - 1 && m < k) fetched[u] = load(gram, int64_t(load(order, step)) * k + m);
        }
    };
    fetch_row(0);
    for (int step = 0; step < k - 1 && load(weights, objective) != 0.0; ++step) {
        PSE_UNROLL
        for (int u = 0; u < kMostObjectives / kRecurThreads; ++u)
            if (thread() + u * kRecurThreads < k) store(row, thread() + u * kRecurThreads, fetched[u]);
        sync_block();
        fetch_row(step + 1);
        const int j = load(order, step);
        if (thread() == 0 && load(weights, j) != 0.0 && load(squared_norms, j) > 0.0) {
            const double dot = dot_of(elements(coefficients), elements(row), int64_t(k));
            store(coefficients, j, without_conflict(load(coefficients, j), dot, load(squared_norms, j)));
        }
        sync_block();
    }
    for (int m = thread(); m < k; m += kRecurThreads)
        store(a.projected, (group * k + objective) * k + m, load(coefficients, m));
    if (!last_block(a.tickets, (group + 1) * a.tickets_per_group - 1, uint32_t(k))) return;
    combine_projected(a, group, weights, squared_norms, elements(a.projected + group * k * k));
}

}  // namespace cuda
}  // namespace pse
