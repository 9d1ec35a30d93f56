#include "cpu/parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// libgomp's entry points, resolved from the runtime that torch has already loaded; null when there is none (serial).
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
}

namespace pse {
namespace {

// Flush-to-zero and denormals-are-zero would change keys, weights and deltas: switched off for the kernel's duration.
class IeeeFloatMode {
  public:
#if defined(__SSE2__)
    IeeeFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80u); }
    ~IeeeFloatMode() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeFloatMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
    }
    ~IeeeFloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

  private:
    uint64_t saved_;
#endif
};

struct Call {
    ParallelBody body;
    void* context;
};

void run_member(void* data) {
    const IeeeFloatMode mode;
    const Call* call = static_cast<const Call*>(data);
    call->body(call->context, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

void parallel_run(int threads, ParallelBody body, void* context) {
    if (threads > 1 && GOMP_parallel != nullptr && omp_get_thread_num != nullptr && omp_get_num_threads != nullptr) {
        Call call{body, context};
        GOMP_parallel(run_member, &call, unsigned(threads), 0);
        return;
    }
    const IeeeFloatMode mode;
    body(context, 0, 1);
}

}  // namespace pse
