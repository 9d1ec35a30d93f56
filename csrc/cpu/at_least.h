// Which keys of a group of 32 are at or above a limit, as a mask: the comparison that decides what is edited or kept.
#pragma once
#include "core/magnitude_key.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pse {
namespace PSE_ISA {

constexpr int kGroup = 32;  // elements per decision: 64 bytes of bf16

// Bit i: keys[i] >= limit, for one group.
static inline uint32_t at_least(const uint32_t* key, uint32_t limit) {
#if defined(__AVX512F__)
    const __m512i bound = _mm512_set1_epi32(int(limit));
    const uint32_t low = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(key), bound);
    const uint32_t high = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(key + 16), bound);
    return low | (high << 16);
#elif defined(__AVX2__)
    const __m256i below = _mm256_set1_epi32(int(limit) - 1);
    uint32_t mask = 0;
    for (int part = 0; part < 4; ++part) {
        const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key + 8 * part));
        mask |= uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(k, below)))) << (8 * part);
    }
    return mask;
#else
    uint32_t mask = 0;
    for (int i = 0; i < kGroup; ++i) mask |= uint32_t(key[i] >= limit) << i;
    return mask;
#endif
}
static inline uint32_t at_least(const uint64_t* key, uint64_t limit) {
    uint32_t mask = 0;
#if defined(__AVX512F__)
    const __m512i bound = _mm512_set1_epi64(int64_t(limit));
    for (int part = 0; part < 4; ++part)
        mask |= uint32_t(_mm512_cmpge_epi64_mask(_mm512_loadu_si512(key + 8 * part), bound)) << (8 * part);
#else
    for (int i = 0; i < kGroup; ++i) mask |= uint32_t(key[i] >= limit) << i;
#endif
    return mask;
}

}  // namespace PSE_ISA
}  // namespace pse
