// Device queries for `prosocial env` and for launches.
#pragma once
#include <utility>

namespace pse {
namespace cuda {

std::pair<int, int> device_count();  // (cudaError_t, count)

// Whether a kernel may start on the current device while those before it in the stream still run: where the device has
// programmatic dependent launch (9.0 on) and the binary holds code for it. PROSOCIAL_CUDA_OVERLAP=off says no.
bool launches_overlap(int device);
bool set_launch_overlap(bool wanted);  // for comparisons within a process; returns what was wanted before

}  // namespace cuda
}  // namespace pse
