// Which instruction set's kernels run. Each set's objects define one table per family (in namespace pse::<set>).
#pragma once
#include <string>
#include <vector>

#include "cpu/limits.h"
#include "cpu/projection.h"
#include "cpu/sampling.h"
#include "cpu/stream.h"
#include "cpu/topm.h"

namespace pse {

struct CpuKernels {
    const char* isa;
    const TopmKernels* topm;
    const ProjectionKernels* projection;
    const SamplingKernels* sampling;
    const LimitKernels* limits;
    const StreamKernels* stream;
};

const CpuKernels& cpu();
std::vector<std::string> available_isas();  // built and supported by this machine, best last
void select_isa(const std::string& name);   // throws std::invalid_argument that lists what is possible

}  // namespace pse
