#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if PSE_HAVE_v2
#include <cpuid.h>
#endif

namespace pse {

#define PSE_DECLARE_TABLES(set)                        \
    namespace set {                                    \
    extern const TopmKernels topm_kernels;             \
    extern const ProjectionKernels projection_kernels; \
    extern const SamplingKernels sampling_kernels;     \
    extern const LimitKernels limit_kernels;           \
    extern const StreamKernels stream_kernels;         \
    }
#define PSE_TABLES(set)        \
    {#set,                     \
     &set::topm_kernels,       \
     &set::projection_kernels, \
     &set::sampling_kernels,   \
     &set::limit_kernels,      \
     &set::stream_kernels}

#if PSE_HAVE_v2
PSE_DECLARE_TABLES(v2)
PSE_DECLARE_TABLES(v3)
PSE_DECLARE_TABLES(v4)
#else
PSE_DECLARE_TABLES(generic)
#endif

namespace {

#if PSE_HAVE_v2
// Read from the processor: g++ 11 does not know the sets by name in __builtin_cpu_supports, and Clang not all features.
struct ProcessorFeatures {
    unsigned basic = 0, extended = 0, more = 0;  // leaf 1 ecx, leaf 7 ebx, leaf 0x80000001 ecx
    unsigned saved = 0;                          // register states that the operating system keeps (XCR0)

    ProcessorFeatures() {
        unsigned a, b, c, d;
        if (__get_cpuid(1, &a, &b, &c, &d)) basic = c;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) extended = b;
        if (__get_cpuid(0x80000001u, &a, &b, &c, &d)) more = c;
        if (basic & bit_OSXSAVE) __asm__ volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    }
    static bool all(unsigned word, unsigned wanted) { return (word & wanted) == wanted; }

    bool v2() const {
        return all(basic, bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_CMPXCHG16B) &&
               all(more, bit_LAHF_LM);
    }
    bool v3() const {
        return all(basic, bit_AVX | bit_F16C | bit_FMA | bit_MOVBE) && all(saved, 0x6) &&
               all(extended, bit_AVX2 | bit_BMI | bit_BMI2) && all(more, bit_LZCNT);
    }
    bool v4() const {
        return all(saved, 0xe6) &&
               all(extended, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
    }
};
#endif

std::vector<CpuKernels> find_available() {
    std::vector<CpuKernels> found;
#if PSE_HAVE_v2
    const ProcessorFeatures features;
    const bool v2 = features.v2(), v3 = v2 && features.v3(), v4 = v3 && features.v4();
    if (v2) found.push_back(PSE_TABLES(v2));
    if (v3) found.push_back(PSE_TABLES(v3));
    if (v4) found.push_back(PSE_TABLES(v4));
#else
    found.push_back(PSE_TABLES(generic));
#endif
    return found;
}

const std::vector<CpuKernels>& available() {
    static const std::vector<CpuKernels> found = find_available();
    return found;
}

const CpuKernels* selected = nullptr;

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const CpuKernels& kernels : available()) names.push_back(kernels.isa);
    return names;
}

void select_isa(const std::string& name) {
    std::string possible;
    for (const CpuKernels& kernels : available()) {
        if (name == kernels.isa) {
            selected = &kernels;
            return;
        }
        possible += possible.empty() ? kernels.isa : std::string(", ") + kernels.isa;
    }
    throw std::invalid_argument("PROSOCIAL_ISA=" + name + " is not possible here: this build has kernels for " +
                                (possible.empty() ? "no instruction set of this machine" : possible) +
                                " on this machine. Unset it to take the best.");
}

const CpuKernels& cpu() {
    if (selected == nullptr) {
        const char* forced = std::getenv("PROSOCIAL_ISA");
        if (forced != nullptr && *forced != '\0') {
            select_isa(forced);
        } else if (!available().empty()) {
            selected = &available().back();
        } else {
            throw std::invalid_argument("this processor is older than x86-64-v2, which the kernels need");
        }
    }
    return *selected;
}

}  // namespace pse
