// The element types of every op, and their exact conversions to and from fp32 (round to nearest even): by bits on the
// host, by the instruction for it on the device. NaN stays NaN; its payload is not promised.
#pragma once
#include "core/arithmetic.h"

#ifdef __CUDA_ARCH__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pse {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };  // the tags that prosocial_ext/ops/_native.py sends

// Distinct types for 16-bit elements, so that templates tell them apart.
struct f16_t {
    uint16_t bits;
};
struct bf16_t {
    uint16_t bits;
};

PSE_HD constexpr int64_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }

namespace PSE_ISA {

PSE_HD float bf16_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

#ifdef __CUDA_ARCH__
PSE_HD float f16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Two at once, the first in the low half: the instruction for one runs at a fraction of the rate.
PSE_HD uint32_t floats_to_bf16(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return uint32_t(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
}
PSE_HD uint32_t floats_to_f16(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return uint32_t(__half_as_ushort(both.y)) << 16 | __half_as_ushort(both.x);
}
PSE_HD uint16_t float_to_bf16(float x) { return uint16_t(floats_to_bf16(x, 0.0f)); }
PSE_HD uint16_t float_to_f16(float x) { return uint16_t(floats_to_f16(x, 0.0f)); }
#else
PSE_HD uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Branch-free so that it vectorises. Subnormals go through integers, so flush-to-zero modes do not matter.
PSE_HD float f16_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + 0x38000000u;        // rebias the exponent from 15 to 127
    const uint32_t special = (magnitude << 13) | 0x7f800000u;       // infinity and NaN
    const float tiny = float(int32_t(magnitude)) * 5.9604645e-08f;  // 2^-24 per unit: exact
    uint32_t bits = magnitude >= 0x7c00u ? special : normal;
    bits = magnitude < 0x0400u ? float_bits(tiny) : bits;
    return bits_float(sign | bits);
}

PSE_HD uint16_t float_to_f16(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: round the 13 dropped bits to nearest even, then rebias; a carry into the exponent is right.
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Subnormal results: adding 2^-1 shifts the significand so that fp32's own rounding does the work.
    const uint32_t tiny = float_bits(add_rn(bits_float(magnitude), 0.5f)) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? tiny : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on the nearest is infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return uint16_t(sign | half);
}

PSE_HD uint32_t floats_to_bf16(float first, float second) {
    return uint32_t(float_to_bf16(second)) << 16 | float_to_bf16(first);
}
PSE_HD uint32_t floats_to_f16(float first, float second) {
    return uint32_t(float_to_f16(second)) << 16 | float_to_f16(first);
}
#endif

}  // namespace PSE_ISA
}  // namespace pse
