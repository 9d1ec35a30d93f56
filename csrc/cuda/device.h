// Device queries for `prosocial env`, and the error convention of the launchers.
#pragma once
#include <utility>

namespace pse {
namespace cuda {

std::pair<int, int> device_count();  // (cudaError_t, count)

}  // namespace cuda
}  // namespace pse
