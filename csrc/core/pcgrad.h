// PCGrad (Yu et al., NeurIPS 2020, Algorithm 1) on the Gram matrix: v_i = sum_m a[m] g_m, so dots are k-vector work.
// Law: same seed, group and objective give the same order everywhere; fp64 throughout, m ascending, nothing fused.
// Objectives are independent of each other. One of weight exactly 0 takes no part: no projection by it or of it.
#pragma once
#include "core/arithmetic.h"
#include "core/philox.h"

namespace pse {

enum class ProjectionOrder : int { given = 0, fixed = 1, random = 2 };  // tags of prosocial_ext/ops/projection.py

namespace PSE_ISA {

// Fisher-Yates over the other objectives in ascending order. Draw d is word d % 4 of the Philox block with key = seed,
// counter = (objective, d / 4, group low, group high); the range enters by the high half of a 32 x 32 bit product.
PSE_HD void draw_order(uint64_t seed, uint64_t group, int64_t objective, int64_t k, int64_t* order) {
    for (int64_t n = 0; n < k - 1; ++n) order[n] = n < objective ? n : n + 1;
    PhiloxBlock block = {};
    for (int64_t left = k - 1, draw = 0; left > 1; --left, ++draw) {
        if (draw % 4 == 0)
            block = philox4x32(uint32_t(seed), uint32_t(seed >> 32), uint32_t(objective), uint32_t(draw / 4),
                               uint32_t(group), uint32_t(group >> 32));
        const int64_t pick = int64_t((uint64_t(block.word[draw % 4]) * uint64_t(left)) >> 32);
        const int64_t last = order[left - 1];
        order[left - 1] = order[pick];
        order[pick] = last;
    }
}

PSE_HD bool takes_part(const double* weights, int64_t objective) {
    return weights == nullptr || weights[objective] != 0.0;
}

// Writes a[0..k): the coefficients of objective's projected gradient. `order` holds the k - 1 others; null is 0..k-1.
PSE_HD void project_objective(const double* gram, const double* weights, const int64_t* order, int64_t objective,
                              int64_t k, double* a) {
    for (int64_t m = 0; m < k; ++m) a[m] = m == objective ? 1.0 : 0.0;
    if (!takes_part(weights, objective)) return;
    for (int64_t step = 0; step < k - 1; ++step) {
        const int64_t j = order != nullptr ? order[step] : step < objective ? step : step + 1;
        const double* row = gram + j * k;  // symmetric: row j is column j
        if (!takes_part(weights, j) || !(row[j] > 0.0)) continue;
        double dot = 0.0;  // a[m] == 0 is skipped: an objective without a part may hold NaN
        for (int64_t m = 0; m < k; ++m)
            if (a[m] != 0.0) dot = add_rn(dot, mul_rn(a[m], row[m]));
        if (dot < 0.0) a[j] = sub_rn(a[j], div_rn(dot, row[j]));
    }
}

// The coefficient of g_m in the weighted sum (or mean) of all projected gradients; `a` is [k, k].
PSE_HD double combined_coefficient(const double* a, const double* weights, int64_t m, int64_t k, bool mean) {
    double sum = 0.0;
    for (int64_t i = 0; i < k; ++i)
        if (takes_part(weights, i))
            sum = add_rn(sum, weights == nullptr ? a[i * k + m] : mul_rn(weights[i], a[i * k + m]));
    return mean ? div_rn(sum, double(k)) : sum;
}

}  // namespace PSE_ISA
}  // namespace pse
