#include "cuda/device.h"

#include <cuda_runtime_api.h>

namespace pse {
namespace cuda {

std::pair<int, int> device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return {int(error), error == cudaSuccess ? count : 0};
}

}  // namespace cuda
}  // namespace pse
