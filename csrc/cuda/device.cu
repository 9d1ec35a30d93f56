#include "cuda/device.h"

#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

namespace pse {
namespace cuda {
namespace {

constexpr int kDevices = 64;  // those beyond are asked about in every launch
enum Answer : signed char { kUnknown, kNo, kYes };
std::atomic<signed char> answers[kDevices];

bool wanted_by_environment() {
    const char* text = getenv("PROSOCIAL_CUDA_OVERLAP");
    return text == nullptr || strcmp(text, "off") != 0;
}
std::atomic<bool>& wanted() {
    static std::atomic<bool> value{wanted_by_environment()};
    return value;
}

__global__ void probe() {}  // compiled for the same architectures as every kernel

bool device_overlaps(int device) {
    int major = 0;
    cudaFuncAttributes code = {};
    const bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                       cudaFuncGetAttributes(&code, probe) == cudaSuccess;
    if (!known) cudaGetLastError();  // it is not for the next launch to report
    return known && major >= 9 && code.ptxVersion >= 90;
}

}  // namespace

std::pair<int, int> device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return {int(error), error == cudaSuccess ? count : 0};
}

bool launches_overlap(int device) {
    if (!wanted()) return false;
    if (device < 0 || device >= kDevices) return device_overlaps(device);
    if (answers[device] == kUnknown) answers[device] = device_overlaps(device) ? kYes : kNo;
    return answers[device] == kYes;
}

bool set_launch_overlap(bool value) { return wanted().exchange(value); }

}  // namespace cuda
}  // namespace pse
