// PCGrad (Yu et al., NeurIPS 2020, Algorithm 1) on the Gram matrix: v_i = sum_m a[m] g_m, so dots are k-vector work.
// Law: same seed, group and objective give the same order everywhere; fp64 throughout, m ascending, nothing fused.
// Objectives are independent of each other. One of weight exactly 0 takes no part: no projection by it or of it.
// Arrays are pointers, or what stands for them where the kernels run checked (simt::elements).
#pragma once
#include "core/arithmetic.h"
#include "core/philox.h"

namespace pse {

enum class ProjectionOrder : int { given = 0, fixed = 1, random = 2 };  // tags of prosocial_ext/ops/projection.py

namespace PSE_ISA {

// Fisher-Yates over the other objectives in ascending order. Draw d is word d % 4 of the Philox block with key = seed,
// counter = (objective, d / 4, group low, group high); the range enters by the high half of a 32 x 32 bit product.
template <class Order>
PSE_HD void draw_order(uint64_t seed, uint64_t group, int64_t objective, int64_t k, Order order) {
    for (int64_t n = 0; n < k - 1; ++n) order[n] = n < objective ? n : n + 1;
    PhiloxBlock block = {};
    for (int64_t left = k - 1, draw = 0; left > 1; --left, ++draw) {
        if (draw % 4 == 0)
            block = philox4x32(uint32_t(seed), uint32_t(seed >> 32), uint32_t(objective), uint32_t(draw / 4),
                               uint32_t(group), uint32_t(group >> 32));
        const int64_t pick = int64_t((uint64_t(block.word[0]) * uint64_t(left)) >> 32);
        for (int n = 0; n < 3; ++n) block.word[n] = block.word[n + 1];  // an index would cost a GPU local memory
        const int64_t last = order[left - 1], picked = order[pick];
        order[left - 1] = picked;
        order[pick] = last;
    }
}

// `weights` may be null: all 1.
template <class Weights>
PSE_HD bool takes_part(Weights weights, int64_t objective) {
    return weights == nullptr || double(weights[objective]) != 0.0;
}

// v . g_j from v's coefficients and row j of the Gram matrix.
template <class Coefficients, class Row>
PSE_HD double dot_of(Coefficients a, Row row, int64_t k) {
    double dot = 0.0;  // a[m] == 0 is skipped: an objective without a part may hold NaN
    for (int64_t m = 0; m < k; ++m) {
        const double coefficient = a[m];
        if (coefficient != 0.0) dot = add_rn(dot, mul_rn(coefficient, double(row[m])));
    }
    return dot;
}

// v's coefficient of g_j after v <- v - dot / (g_j . g_j) g_j, where dot < 0.
PSE_HD double without_conflict(double coefficient, double dot, double squared_norm) {
    return dot < 0.0 ? sub_rn(coefficient, div_rn(dot, squared_norm)) : coefficient;
}

// Writes a[0..k): the coefficients of objective's projected gradient. `order` holds the k - 1 others; null is 0..k-1.
template <class Gram, class Weights, class Order, class Coefficients>
PSE_HD void project_objective(Gram gram, Weights weights, Order order, int64_t objective, int64_t k, Coefficients a) {
    for (int64_t m = 0; m < k; ++m) a[m] = m == objective ? 1.0 : 0.0;
    if (!takes_part(weights, objective)) return;
    for (int64_t step = 0; step < k - 1; ++step) {
        const int64_t j = order != nullptr ? int64_t(order[step]) : step < objective ? step : step + 1;
        const auto row = gram + j * k;  // symmetric: row j is column j
        const double squared_norm = row[j];
        if (!takes_part(weights, j) || !(squared_norm > 0.0)) continue;
        a[j] = without_conflict(a[j], dot_of(a, row, k), squared_norm);
    }
}

// The coefficient of g_m in the weighted sum (or mean) of all projected gradients; `a` is [k, k].
template <class Projected, class Weights>
PSE_HD double combined_coefficient(Projected a, Weights weights, int64_t m, int64_t k, bool mean) {
    double sum = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        if (!takes_part(weights, i)) continue;
        const double coefficient = a[i * k + m];
        sum = add_rn(sum, weights == nullptr ? coefficient : mul_rn(double(weights[i]), coefficient));
    }
    return mean ? div_rn(sum, double(k)) : sum;
}

}  // namespace PSE_ISA
}  // namespace pse
