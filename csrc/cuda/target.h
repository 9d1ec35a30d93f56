// Where a launcher's work goes. Known to bindings, which the host's compiler builds, so no CUDA here.
#pragma once

namespace pse {
namespace simt {

struct Target {
    int device;
    void* stream;  // a cudaStream_t
};

}  // namespace simt
}  // namespace pse
