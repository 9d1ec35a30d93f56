// Blocks of elements to and from fp32 / fp64 working buffers. Exact up to the one rounding of a store.
#pragma once
#include "core/dtype.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pse {
namespace PSE_ISA {

static inline void load_block(const float* __restrict src, int64_t n, float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = src[i];
}
static inline void load_block(const double* __restrict src, int64_t n, float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = float(src[i]);
}
static inline void load_block(const bf16_t* __restrict src, int64_t n, float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(src[i].bits);
}
static inline void load_block(const f16_t* __restrict src, int64_t n, float* __restrict out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(src + i)))));
#endif
    for (; i < n; ++i) out[i] = f16_to_float(src[i].bits);
}

static inline void load_block(const double* __restrict src, int64_t n, double* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = src[i];
}
template <class T>
static inline void load_block(const T* __restrict src, int64_t n, double* __restrict out) {
    float part[256];
    for (int64_t start = 0; start < n; start += 256) {
        const int64_t count = n - start < 256 ? n - start : 256;
        load_block(src + start, count, part);
        for (int64_t i = 0; i < count; ++i) out[start + i] = part[i];
    }
}

template <class Real>
static inline void load_block(const void* src, DType dtype, int64_t offset, int64_t n, Real* out) {
    switch (dtype) {
        case DType::f32: return load_block(static_cast<const float*>(src) + offset, n, out);
        case DType::f64: return load_block(static_cast<const double*>(src) + offset, n, out);
        case DType::f16: return load_block(static_cast<const f16_t*>(src) + offset, n, out);
        case DType::bf16: return load_block(static_cast<const bf16_t*>(src) + offset, n, out);
    }
}

static inline void store_element(float x, float* out) { *out = x; }
static inline void store_element(float x, bf16_t* out) { out->bits = float_to_bf16(x); }
static inline void store_element(float x, f16_t* out) { out->bits = float_to_f16(x); }
static inline void store_element(double x, double* out) { *out = x; }

}  // namespace PSE_ISA
}  // namespace pse
