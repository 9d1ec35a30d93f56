// Native vectors of doubles: as many as the instruction set holds, eight of them a group of lanes.
#pragma once
#include "core/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pse {
namespace PSE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
typedef double Doubles __attribute__((vector_size(8 * kWidth)));

static inline Doubles splat(double x) { return x - Doubles{}; }  // x - (+0) is x, also for -0

static inline Doubles load_lanes(const double* src) {
    Doubles x;
    __builtin_memcpy(&x, src, sizeof x);
    return x;
}
static inline void store_lanes(Doubles x, double* out) { __builtin_memcpy(out, &x, sizeof x); }

#if defined(__AVX512F__)
static inline Doubles load_lanes(const float* src) { return _mm512_cvtps_pd(_mm256_loadu_ps(src)); }
static inline Doubles load_lanes(const bf16_t* src) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
}
static inline Doubles load_lanes(const f16_t* src) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))));
}
static inline void store_lanes(Doubles x, float* out) { _mm256_storeu_ps(out, _mm512_cvtpd_ps(x)); }
static inline Doubles fused(Doubles x, Doubles y, Doubles sum) { return _mm512_fmadd_pd(x, y, sum); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
static inline Doubles load_lanes(const float* src) { return _mm256_cvtps_pd(_mm_loadu_ps(src)); }
static inline Doubles load_lanes(const bf16_t* src) {
    const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(words, 16)));
}
static inline Doubles load_lanes(const f16_t* src) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src))));
}
static inline void store_lanes(Doubles x, float* out) { _mm_storeu_ps(out, _mm256_cvtpd_ps(x)); }
static inline Doubles fused(Doubles x, Doubles y, Doubles sum) { return _mm256_fmadd_pd(x, y, sum); }
#else
static inline float as_float(float x) { return x; }
static inline float as_float(bf16_t x) { return bf16_to_float(x.bits); }
static inline float as_float(f16_t x) { return f16_to_float(x.bits); }
template <class T>
static inline Doubles load_lanes(const T* src) {
    Doubles x;
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = as_float(src[lane]);
    return x;
}
static inline void store_lanes(Doubles x, float* out) {
    for (int lane = 0; lane < kWidth; ++lane) out[lane] = float(x[lane]);
}
#if defined(__aarch64__)
static inline Doubles fused(Doubles x, Doubles y, Doubles sum) { return Doubles(vfmaq_f64(sum, x, y)); }
#else
static inline Doubles fused(Doubles x, Doubles y, Doubles sum) { return sum + x * y; }
#endif
#endif

// sum + x * y. Where the product is exact in fp64 (factors of 24 significant bits or fewer) one rounding or two give
// the same bits, so the instruction set's fused form is allowed; otherwise never.
template <bool kExactProduct>
static inline Doubles accumulate(Doubles x, Doubles y, Doubles sum) {
    if constexpr (kExactProduct) return fused(x, y, sum);
    return sum + x * y;
}

}  // namespace PSE_ISA
}  // namespace pse
