// A token's integer weight and what is computed from integer masses. python_ref/sampling.py is the definition.
// Law: weight(best) == 2^40 exactly; the same integer on every device and instruction set, so every sum is exact.
#pragma once
#include "core/arithmetic.h"

namespace pse {
namespace PSE_ISA {

constexpr int kFractionBits = 40;
constexpr float kLog2E = 1.44269502162933349609375f;
constexpr float kLargest = 3.402823466e+38f;

// z in fp32 to an integer of the same order; -0 must be +0 already. Finite keys lie between those of -inf and +inf.
constexpr int32_t kKeyOfInfinity = 0x7f800000;
constexpr int32_t kKeyOfMinusInfinity = int32_t(0x807fffffu);
PSE_HD int32_t key_of(float z) {
    const int32_t bits = int32_t(float_bits(z));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
PSE_HD float float_of_key(int32_t key) { return bits_float(uint32_t(key ^ ((key >> 31) & 0x7fffffff))); }

// log2(e) / temperature, finite: an infinite factor would turn the best token's 0 into NaN.
PSE_HD float inverse_temperature(float temperature) {
    const float c = kLog2E / temperature;
    return c > kLargest ? kLargest : c;
}

// log2 of the weight: (z - best) first, since the other order costs 1e-4 at temperature 0.01. NaN weighs nothing.
PSE_HD float exponent_of(float z, float best, float c) { return max_number(mul_rn(sub_rn(z, best), c), -60.0f); }

// Where floats are converted to 64-bit integers fast: AVX512DQ, and GPUs with fp64 units in number (16 conversions a
// cycle and multiprocessor; others have 2).
#if defined(__AVX512DQ__)
constexpr bool kConvertsTo64Bits = true;
#elif defined(__CUDA_ARCH__)
constexpr bool kConvertsTo64Bits = __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000;
#else
constexpr bool kConvertsTo64Bits = false;
#endif

// floor(2^y * 2^40) up to the polynomial's rounding. Two forms of one integer: the polynomial is exact when scaled by a
// power of two, and bits(y + 1.5 * 2^23) ends in n, so that n needs no conversion.
PSE_HD uint64_t weight_of_exponent(float y) {
    constexpr float kScale = kConvertsTo64Bits ? 1099511627776.0f  // 2^40: scaled by 2^n, then converted to 64 bits
                                               : 536870912.0f;     // 2^29: converted to 30 bits, then shifted
    const float shifted = add_rn(y, 12582912.0f);
    const float f = sub_rn(y, sub_rn(shifted, 12582912.0f));  // y - n, in [-1/2, 1/2]
    float p = 0.0013274633092805743f * kScale;
    p = add_rn(mul_rn(p, f), 0.009671961888670921f * kScale);
    p = add_rn(mul_rn(p, f), 0.055506784468889236f * kScale);
    p = add_rn(mul_rn(p, f), 0.24022234976291656f * kScale);
    p = add_rn(mul_rn(p, f), 0.6931470632553101f * kScale);
    p = add_rn(mul_rn(p, f), kScale);
    if (kConvertsTo64Bits) return uint64_t(int64_t(bits_float(float_bits(p) + (float_bits(shifted) << 23))));
    return (uint64_t(uint32_t(int32_t(p))) << 11) >> (0x4b400000u - float_bits(shifted));
}

PSE_HD uint64_t weight_of(float z, float best, float c) { return weight_of_exponent(exponent_of(z, best, c)); }

// floor(fraction * 2^bits) of an fp32 fraction in [0, 1): exact, since the significand has 24 bits.
PSE_HD uint64_t fixed_point(float fraction, int bits) {
    if (fraction <= 0.0f) return 0;
    const uint32_t raw = float_bits(fraction);
    const int exponent = int(raw >> 23) - 150 + bits;  // of the significand as an integer
    const uint64_t significand = (raw >> 23) != 0 ? uint64_t((raw & 0x7fffffu) | 0x800000u) : uint64_t(raw) << 1;
    if (exponent >= 0) return significand << exponent;
    return exponent <= -64 ? 0 : significand >> -exponent;
}

// ln(mass / 2^40), by a series in unfused fp64 steps.
PSE_HD double log_mass(uint64_t mass) {
    const uint64_t bits = double_bits(double(int64_t(mass)));
    int exponent = int(bits >> 52) - 1022;
    double ratio = bits_double((bits & 0x000fffffffffffffull) | 0x3fe0000000000000ull);  // in [1/2, 1)
    if (ratio < 0.7071067811865476) {
        ratio = mul_rn(ratio, 2.0);
        exponent -= 1;
    }
    const double s = div_rn(sub_rn(ratio, 1.0), add_rn(ratio, 1.0));
    const double square = mul_rn(s, s);
    double series = 0.0;
    for (int odd = 21; odd >= 1; odd -= 2) series = add_rn(mul_rn(series, square), div_rn(1.0, double(odd)));
    return add_rn(mul_rn(double(exponent - kFractionBits), 0.6931471805599453), mul_rn(mul_rn(2.0, s), series));
}

// ln of the probability of a token `below` = z - best under the row's temperature.
PSE_HD float log_probability(double below, double temperature, double log_mass_of_row) {
    return float(sub_rn(div_rn(below, temperature), log_mass_of_row));
}

}  // namespace PSE_ISA
}  // namespace pse
