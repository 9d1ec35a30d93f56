// The CUDA runtime that csrc/cuda is linked with here: some devices that are the machine of machine.h, on host memory.
// Launches are checked as a driver would check them, and have run when the call returns.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <string.h>

#include <memory>

#include "machine.h"

namespace pse {
namespace ptx {

uint64_t seed = 0;
int64_t launches = 0;
int current_device = 0;

namespace {

// What nvcc leaves in an object: a list of images, each PTX or machine code for one architecture.
struct Wrapper {
    uint32_t magic, version;
    const char* data;
    const void* file;
};
struct Images {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
};
struct Image {
    uint16_t kind, version;  // 1: PTX
    uint32_t header_bytes;
    uint64_t bytes;
    uint32_t compressed_bytes, options;
    uint16_t minor, major;
    uint32_t architecture;
};

struct Module {
    std::map<int, std::string> texts;  // by architecture
    std::map<int, std::map<std::string, Kernel>> kernels;
};
struct Entry {
    Module* module;
    std::string name;
    std::map<int, int64_t> dynamic_shared;  // by device: what a launch may ask for, beside what the kernel has
};
std::map<const void*, Entry>& entries() {
    static std::map<const void*, Entry> map;
    return map;
}
std::vector<std::unique_ptr<Module>>& modules() {
    static std::vector<std::unique_ptr<Module>> list;
    return list;
}

Entry& entry(const void* function) {
    const auto found = entries().find(function);
    if (found == entries().end()) fail("a function that is not a kernel");
    return found->second;
}
constexpr int kDevices = int(sizeof kCapabilities / sizeof kCapabilities[0]);
int capability() { return kCapabilities[current_device]; }

// The code for the device: of the latest architecture that it knows.
std::pair<int, const Kernel*> code(const Entry& e) {
    Module& m = *e.module;
    auto text = m.texts.upper_bound(capability());
    if (text == m.texts.begin()) return {0, nullptr};
    --text;
    auto& kernels = m.kernels[text->first];
    if (kernels.empty()) kernels = parse(text->second);
    return {text->first, &kernels.at(e.name)};
}
int64_t most_shared(int capability) { return capability >= 90 ? 227 << 10 : capability >= 80 ? 163 << 10 : 64 << 10; }

}  // namespace
}  // namespace ptx
}  // namespace pse

using namespace pse::ptx;

extern "C" {

void** __cudaRegisterFatBinary(void* address) {
    const Wrapper& wrapper = *static_cast<const Wrapper*>(address);
    Images images;
    memcpy(&images, wrapper.data, sizeof images);
    if (wrapper.magic != 0x466243b1 || images.magic != 0xba55ed50) fail("an unknown form of nvcc's images");
    modules().emplace_back(new Module);
    Module& m = *modules().back();
    const char* at = wrapper.data + images.header_bytes;
    const char* const end = at + images.bytes;
    for (Image image; at < end; at += image.header_bytes + image.bytes) {
        memcpy(&image, at, sizeof image);
        if (image.kind == 1 && image.compressed_bytes != 0) fail("compressed PTX: compile with --no-compress");
        if (image.kind == 1)
            m.texts[int(image.architecture)] = std::string(at + image.header_bytes, image.bytes).c_str();
    }
    return reinterpret_cast<void**>(&m);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* function, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
    entries()[function] = {reinterpret_cast<Module*>(module), name, {}};
}
// Of launches by <<< >>>, which no kernel here has; CUDA 12 and 13 name different ones.
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return unsigned(cudaErrorNotSupported); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = kDevices;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* index) {
    *index = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= kDevices) return cudaErrorInvalidDevice;
    current_device = index;
    return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
    if (index < 0 || index >= kDevices) return cudaErrorInvalidDevice;
    const int capability = kCapabilities[index];
    if (attribute == cudaDevAttrComputeCapabilityMajor)
        *value = capability / 10;
    else if (attribute == cudaDevAttrClusterLaunch)
        *value = capability >= 90;
    else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
        *value = int(most_shared(capability));
    else
        return cudaErrorInvalidValue;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    const auto found = code(entry(function));
    if (found.second == nullptr) return cudaErrorNoKernelImageForDevice;
    *attributes = {};
    attributes->ptxVersion = attributes->binaryVersion = found.first;
    attributes->sharedSizeBytes = size_t(found.second->shared_bytes);
    attributes->maxThreadsPerBlock = found.second->most_threads;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    Entry& e = entry(function);
    const Kernel* kernel = code(e).second;
    if (kernel == nullptr) return cudaErrorNoKernelImageForDevice;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    if (value < 0 || kernel->shared_bytes + value > most_shared(capability())) return cudaErrorInvalidValue;
    e.dynamic_shared[current_device] = value;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    Entry& e = entry(function);
    const Kernel* kernel = code(e).second;
    if (kernel == nullptr) return cudaErrorNoKernelImageForDevice;
    int size = 1;
    bool overlapping = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config->attrs[i];
        if (capability() < 90) return cudaErrorNotSupported;  // both kinds came with 9.0
        if (attribute.id == cudaLaunchAttributeClusterDimension) {
            const auto& dim = attribute.val.clusterDim;
            size = int(dim.x);
            if (dim.y != 1 || dim.z != 1 || size < 1 || size > 8) return cudaErrorInvalidClusterSize;
        } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            overlapping = attribute.val.programmaticStreamSerializationAllowed != 0;
        } else {
            return cudaErrorNotSupported;
        }
    }
    const dim3 &grid = config->gridDim, &block = config->blockDim;
    if (grid.x == 0 || grid.x > unsigned(INT32_MAX) || grid.y != 1 || grid.z != 1 || grid.x % unsigned(size) != 0)
        return cudaErrorInvalidConfiguration;
    if (block.x == 0 || block.x % 32 != 0 || int(block.x) > kernel->most_threads || block.y != 1 || block.z != 1)
        return cudaErrorInvalidConfiguration;
    const int64_t dynamic = int64_t(config->dynamicSmemBytes);
    const auto asked = e.dynamic_shared.find(current_device);
    const int64_t most = asked != e.dynamic_shared.end() ? asked->second : (48 << 10) - kernel->shared_bytes;
    if (dynamic > most || kernel->shared_bytes + dynamic > most_shared(capability())) return cudaErrorInvalidValue;
    std::vector<uint64_t> parameters(size_t(kernel->parameter_bytes) / 8 + 1);
    for (size_t i = 0; i < kernel->parameters.size(); ++i)
        memcpy(reinterpret_cast<char*>(parameters.data()) + kernel->parameters[i].offset, arguments[i],
               size_t(kernel->parameters[i].size));
    run({kernel, int64_t(grid.x) / size, size, int(block.x), dynamic, parameters.data(), seed + uint64_t(launches),
         overlapping});
    ++launches;
    return cudaSuccess;
}

}  // extern "C"
