// One rounding per operation, never fused: the promise that makes CPU, CUDA and reference agree to the bit.
// On the host -ffp-contract=off keeps the plain operators apart; on the device the intrinsics do.
#pragma once
#include "core/macros.h"

namespace pse {
namespace PSE_ISA {

#ifdef __CUDA_ARCH__
PSE_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
PSE_HD float sub_rn(float a, float b) { return __fsub_rn(a, b); }
PSE_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
PSE_HD float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PSE_HD double add_rn(double a, double b) { return __dadd_rn(a, b); }
PSE_HD double sub_rn(double a, double b) { return __dsub_rn(a, b); }
PSE_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
PSE_HD double div_rn(double a, double b) { return __ddiv_rn(a, b); }
#else
PSE_HD float add_rn(float a, float b) { return a + b; }
PSE_HD float sub_rn(float a, float b) { return a - b; }
PSE_HD float mul_rn(float a, float b) { return a * b; }
PSE_HD float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PSE_HD double add_rn(double a, double b) { return a + b; }
PSE_HD double sub_rn(double a, double b) { return a - b; }
PSE_HD double mul_rn(double a, double b) { return a * b; }
PSE_HD double div_rn(double a, double b) { return a / b; }
#endif

// The larger of x and a number; the number where x is NaN.
PSE_HD float max_number(float x, float number) {
#ifdef __CUDA_ARCH__
    return fmaxf(x, number);
#else
    return x > number ? x : number;
#endif
}

// Reinterpretation of bits; the memcpy is a register move.
PSE_HD uint32_t float_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
PSE_HD float bits_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
PSE_HD uint64_t double_bits(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    return bits;
}
PSE_HD double bits_double(uint64_t bits) {
    double x;
    __builtin_memcpy(&x, &bits, 8);
    return x;
}

// High 64 bits of a 64 x 64 bit product.
PSE_HD uint64_t mulhi64(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

}  // namespace PSE_ISA
}  // namespace pse
