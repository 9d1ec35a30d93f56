#include "cpu/limits.h"

#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace pse {
namespace PSE_ISA {

constexpr int64_t kChunk = 1 << 16;

static uint64_t read(const void* data, int64_t bytes, int threads) {
    const uint64_t* words = static_cast<const uint64_t*>(data);
    const int64_t count = bytes / 8;
    uint64_t total = 0;
    parallel_for((count + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * kChunk < count ? (chunk + 1) * kChunk : count;
        uint64_t lanes[32] = {};
        int64_t i = chunk * kChunk;
        for (; i + 32 <= end; i += 32)
            for (int lane = 0; lane < 32; ++lane) lanes[lane] ^= words[i + lane];
        for (; i < end; ++i) lanes[0] ^= words[i];
        uint64_t part = 0;
        for (uint64_t lane : lanes) part ^= lane;
        __atomic_fetch_xor(&total, part, __ATOMIC_RELAXED);
    });
    return total;
}

template <class T>
static inline void axpy_chunk(T* params, const T* base, const T* tuned, int64_t n, float scale) {
    float p[512], b[512], t[512];
    for (int64_t start = 0; start < n; start += 512) {
        const int64_t count = n - start < 512 ? n - start : 512;
        load_block(params + start, count, p);
        load_block(base + start, count, b);
        load_block(tuned + start, count, t);
        for (int64_t i = 0; i < count; ++i)
            store_element(sub_rn(p[i], mul_rn(scale, sub_rn(t[i], b[i]))), params + start + i);
    }
}

static void axpy(void* params, const void* base, const void* tuned, DType dtype, int64_t n, float scale, int threads) {
    parallel_for((n + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
        const int64_t start = chunk * kChunk;
        const int64_t count = n - start < kChunk ? n - start : kChunk;
        if (dtype == DType::f32)
            axpy_chunk(static_cast<float*>(params) + start, static_cast<const float*>(base) + start,
                       static_cast<const float*>(tuned) + start, count, scale);
        else
            axpy_chunk(static_cast<bf16_t*>(params) + start, static_cast<const bf16_t*>(base) + start,
                       static_cast<const bf16_t*>(tuned) + start, count, scale);
    });
}

extern const LimitKernels limit_kernels;
const LimitKernels limit_kernels = {read, axpy};

}  // namespace PSE_ISA
}  // namespace pse
