// One guide's step of z = base + sum_g w_g * guide_g, and which sampling parameters have a meaning.
// Law: -inf masks a token: in the base whatever a guide says, in a guide where its guidance is positive.
#pragma once
#include "core/arithmetic.h"

namespace pse {
namespace PSE_ISA {

constexpr float kMinusInfinity = -__builtin_inff();

// z + w * g for w > 0: where either is -inf the token is masked.
PSE_HD float guided_toward(float z, float g, float w) {
    const float sum = add_rn(z, mul_rn(w, g));
    return ((z == kMinusInfinity) | (g == kMinusInfinity)) ? kMinusInfinity : sum;
}

// z + w * g for w < 0: an infinite guide logit is NaN, an error of the row, unless the token is masked.
PSE_HD float guided_away(float z, float g, float w) {
    const bool infinite = (float_bits(g) & 0x7fffffffu) == 0x7f800000u;
    const float sum = add_rn(z, mul_rn(w, infinite ? bits_float(0x7fc00000u) : g));
    return z == kMinusInfinity ? kMinusInfinity : sum;
}

PSE_HD float guided(float z, float g, float w) { return w > 0.0f ? guided_toward(z, g, w) : guided_away(z, g, w); }

PSE_HD bool is_nan(float x) { return x != x; }
PSE_HD bool finite_number(float x) { return (float_bits(x) & 0x7fffffffu) < 0x7f800000u; }

PSE_HD bool valid_parameters(float temperature, float top_p, float min_p, int64_t top_k, int64_t seed, int64_t offset) {
    return temperature >= 0.0f && finite_number(temperature) && top_p >= 0.0f && top_p <= 1.0f && min_p >= 0.0f &&
           min_p <= 1.0f && top_k >= 0 && seed >= 0 && offset >= 0;
}

}  // namespace PSE_ISA
}  // namespace pse
