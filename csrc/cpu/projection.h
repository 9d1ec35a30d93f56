// K2 on the CPU: the Gram matrix of k gradients, PCGrad in Gram space, and the combination (csrc/core/pcgrad.h).
#pragma once
#include <stdint.h>

#include "core/dtype.h"
#include "core/pcgrad.h"

namespace pse {

// k gradients per group, each a run of tensors. Contiguous [groups, k, n] has one tensor and `dense`; lists have one
// group and `table`, objective-major [k, tensors] addresses. Tensor t has the same count and dtype in every objective.
struct Gradients {
    const char* dense;
    const uint64_t* table;
    const int64_t* counts;       // [tensors]
    const int64_t* first_block;  // [tensors + 1]: blocks of each tensor, cumulated
    const int32_t* dtypes;       // [tensors]
    int64_t tensors;
    int64_t groups;
    int64_t k;
};

struct Recurrence {
    const double* gram;     // [groups, k, k]
    const double* weights;  // [groups, k], or null: all 1
    const int64_t* order;   // [k, k - 1] where mode is given
    uint64_t seed;
    ProjectionOrder mode;
    bool mean;
    double* projected;  // out [groups, k, k]: coefficients of each projected gradient
    double* combined;   // out [groups, k]: coefficients of the result
};

struct ProjectionKernels {
    int64_t block;                                                  // elements per block
    int64_t (*scratch_bytes)(const Gradients& grads, int threads);  // 64-byte aligned
    void (*gram)(const Gradients& grads, double* gram, char* scratch, int threads);
    // False where an objective that takes part has a squared norm that is not finite; the outputs are then unspecified.
    bool (*recur)(const Recurrence& recurrence, int64_t groups, int64_t k, char* scratch, int threads);
    // out: one address per tensor, holding [groups, counts[t]] of dtypes[t].
    void (*combine)(const Gradients& grads, const double* combined, const double* weights, const uint64_t* out,
                    char* scratch, int threads);
};

}  // namespace pse
