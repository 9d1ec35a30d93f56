// What the memory of this machine allows, measured in the same run as the kernels (benchmarks only).
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace pse {

struct LimitKernels {
    // One pass of loads over `bytes`, a multiple of 64; the result only keeps the loads alive.
    uint64_t (*read)(const void* data, int64_t bytes, int threads);
    // params -= scale * (tuned - base) over all n elements: the dense form of the top-m edit. float32 and bfloat16.
    void (*axpy)(void* params, const void* base, const void* tuned, DType dtype, int64_t n, float scale, int threads);
};

}  // namespace pse
