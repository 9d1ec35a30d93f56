// The order in which Gram sums are added, on the CPU and on CUDA.
// Law: one order, so one result to the bit for any thread count, instruction set, grid and device. In each tensor anew:
//   lane   column c of a block of kGramBlock belongs to lane c % kGramLanes; a lane adds its products in ascending
//   order block  join_lanes: a fixed tree over the lanes run    kGramRun neighbouring blocks, in order, from 0 group
//   its runs, in order, from 0
#pragma once
#include "core/arithmetic.h"

namespace pse {
namespace PSE_ISA {

constexpr int64_t kGramBlock = 4096;  // partial sums are k / kGramBlock of the input: 1.6 % at k = 64
constexpr int64_t kGramLanes = 8;     // two vectors of AVX2, one of AVX-512; a 32-byte sector of fp32
constexpr int64_t kGramRun = 64;  // runs are joined side by side: one chain of all blocks costs a GPU 10 % of the pass

PSE_HD constexpr int64_t pairs_of(int64_t k) { return k * (k + 1) / 2; }
PSE_HD int64_t pair_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }  // j <= i

// sum + x * y. Where the product is exact in fp64 (factors of 24 significant bits or fewer) fused or not is the same.
template <bool kExactProduct>
PSE_HD double add_product(double sum, double x, double y) {
#ifdef __CUDA_ARCH__
    if (kExactProduct) return __fma_rn(x, y, sum);
#endif
    return add_rn(sum, mul_rn(x, y));
}

PSE_HD double join_lanes(const double* s) {
    return add_rn(add_rn(add_rn(s[0], s[4]), add_rn(s[2], s[6])), add_rn(add_rn(s[1], s[5]), add_rn(s[3], s[7])));
}

}  // namespace PSE_ISA
}  // namespace pse
