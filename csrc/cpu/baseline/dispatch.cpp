#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

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

std::vector<CpuKernels> find_available() {
    std::vector<CpuKernels> found;
#if PSE_HAVE_v2
    // Feature by feature: g++ 11 does not know the sets by name here.
#define PSE_HAS(feature) (__builtin_cpu_supports(feature) != 0)
    __builtin_cpu_init();
    const bool v2 = PSE_HAS("cmpxchg16b") && PSE_HAS("lahf_lm") && PSE_HAS("popcnt") && PSE_HAS("sse3") &&
                    PSE_HAS("ssse3") && PSE_HAS("sse4.1") && PSE_HAS("sse4.2");
    const bool v3 = v2 && PSE_HAS("osxsave") && PSE_HAS("avx") && PSE_HAS("avx2") && PSE_HAS("bmi") &&
                    PSE_HAS("bmi2") && PSE_HAS("f16c") && PSE_HAS("fma") && PSE_HAS("lzcnt") && PSE_HAS("movbe");
    const bool v4 = v3 && PSE_HAS("avx512f") && PSE_HAS("avx512bw") && PSE_HAS("avx512cd") && PSE_HAS("avx512dq") &&
                    PSE_HAS("avx512vl");
#undef PSE_HAS
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
