// The launchers of csrc/cuda as a submodule: prosocial_ext._C.cuda, and tests/simt's twin of it on host memory.
// Every launcher takes (device, stream) last and returns a cudaError_t as an int.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace pse {

void register_cuda_topm(pybind11::module_& m);
void register_cuda_projection(pybind11::module_& m);
void register_cuda_sampling(pybind11::module_& m);

inline void register_cuda(pybind11::module_& m) {
    register_cuda_topm(m);
    register_cuda_projection(m);
    register_cuda_sampling(m);
}

}  // namespace pse
