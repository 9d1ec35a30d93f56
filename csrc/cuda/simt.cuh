// The subset of CUDA that kernels may use, and nothing beside it (CONTRIBUTING.md says how to extend it).
// nvcc makes each name CUDA's own instruction. With PSE_SIMT the host compiler takes tests/simt/harness.h instead: the
// very same kernels then run on the CPU, a fiber per thread, and what no GPU checks is checked: bounds, races inside
// and between blocks, diverged barriers and collectives, reads of unwritten shared memory.
//
// Rules   Blocks are whole warps. Memory is reached by load() and store(), never by operator[]. Global memory is a
//         Global<T> that knows its size (harness only). Atomics are on integers, relaxed; floats never.
//         Blocks meet in last_block() alone, the only fence in the code base, and within a cluster in cluster_sync().
//         A kernel's first statement is after_earlier_launches(): its blocks may be there before the launches before
//         it in the stream have finished.
#pragma once
#include "core/arithmetic.h"
#include "cuda/device.h"
#include "cuda/target.h"

#ifdef PSE_SIMT
#include "harness.h"
#else
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace pse {
namespace simt {

#define PSE_DEVICE __device__ __forceinline__
#define PSE_METHOD __device__ __forceinline__                                  // the same for a function of a struct
#define PSE_KERNEL(...) static __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks per processor
#define PSE_SHARED(T, name, count) __shared__ T name[count]
#define PSE_COPIED_SHARED(T, name, count) __shared__ alignas(16) T name[count]  // for copies and vectors
#define PSE_LAUNCHED_SHARED(T, name) extern __shared__ T name[]  // as many as launch_clusters() was told: one a kernel
#define PSE_UNROLL _Pragma("unroll")
#define PSE_CALLER  // ends the parameters of a function that holds collectives: the harness then knows who calls it

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- memory

template <class T>
using Global = T*;
template <class T>
using Shared = T*;  // what a function takes that works on a PSE_SHARED array

template <class T>
PSE_HD Global<T> global(const void* address, int64_t) {
    return static_cast<T*>(const_cast<void*>(address));
}
template <class T>
PSE_HD Global<T> global(int64_t address, int64_t) {
    return reinterpret_cast<T*>(address);
}
// The same for an address that a kernel reads or computes and then streams from. nvcc cannot see that it is not one of
// shared memory and would make generic accesses of it, which are slower (LD, not LDG). It is not said of every address:
// where a dozen pointers may be the one that is read, nvcc's analysis of them does not end.
template <class T>
PSE_DEVICE Global<T> streamed(int64_t address, int64_t) {
    return static_cast<T*>(__cvta_global_to_generic(size_t(address)));
}

template <class T>
PSE_DEVICE T load(const T* p, int64_t i) {
    return p[i];
}
template <class T>
PSE_DEVICE void store(T* p, int64_t i, T value) {
    p[i] = value;
}

// What functions of csrc/core take for a pointer: p[i] is load(p, i), p[i] = x is store(p, i, x).
template <class T>
PSE_DEVICE T* elements(T* p) {
    return p;
}

// N neighbouring elements in one access of sizeof(T) * N <= 16 bytes, to which the address must be aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};
template <int N, class T>
PSE_DEVICE Vector<T, N> load_vector(const T* p, int64_t i) {
    return *reinterpret_cast<const Vector<T, N>*>(p + i);
}
template <int N, class T>
PSE_DEVICE void store_vector(T* p, int64_t i, const Vector<T, N>& value) {
    *reinterpret_cast<Vector<T, N>*>(p + i) = value;
}
// Starts a copy of N elements, 4 or 16 bytes, from global to shared memory, both at multiples of so many bytes; 16 go
// past the L1 cache. A thread commits the copies it has started as a group and waits for all groups but its latest
// ones; only then has it written what it copied, and others may read it after a barrier.
template <int N, class T>
PSE_DEVICE void copy_async(T* to, int64_t i, const T* from, int64_t j) {
    constexpr int kBytes = int(sizeof(T)) * N;
    static_assert(kBytes == 4 || kBytes == 16, "what kernels copy");
    __pipeline_memcpy_async(to + i, from + j, kBytes);
}
PSE_DEVICE void commit_copies() { __pipeline_commit(); }
template <int kLeft>
PSE_DEVICE void wait_copies() {
    __pipeline_wait_prior(kLeft);
}
template <class T>
PSE_DEVICE bool is_aligned(const T* p, int64_t i, int bytes) {
    return reinterpret_cast<uintptr_t>(p + i) % bytes == 0;
}

// ---- where a thread is

PSE_DEVICE int thread() { return int(threadIdx.x); }
PSE_DEVICE int threads() { return int(blockDim.x); }
PSE_DEVICE int64_t block() { return int64_t(blockIdx.x); }
PSE_DEVICE int64_t blocks() { return int64_t(gridDim.x); }
PSE_DEVICE int lane() { return int(threadIdx.x) % kWarp; }
PSE_DEVICE int warp() { return int(threadIdx.x / kWarp); }

// ---- the order of launches

// Waits for the launches before this one in the stream, and for what they wrote. From compute capability 9.0 on the
// next launch may send its blocks, which wait here, as soon as all of this one's are running: what it takes to start
// them is hidden (programmatic dependent launch). A thread that left a kernel without this would let the next but one
// run early.
PSE_DEVICE void after_earlier_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
#endif
}

// ---- barriers and collectives: every thread of the block, or every lane of the mask, takes part at the same place

PSE_DEVICE void sync_block() { __syncthreads(); }
PSE_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
PSE_DEVICE T shuffle(T value, int from) {
    return __shfl_sync(kAllLanes, value, from);
}
template <class T>
PSE_DEVICE T shuffle_down(T value, int by) {
    return __shfl_down_sync(kAllLanes, value, by);
}
template <class T>
PSE_DEVICE T shuffle_up(T value, int by) {
    return __shfl_up_sync(kAllLanes, value, by);
}
template <class T>
PSE_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}
PSE_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }

// d += A B by the tensor cores, in fp64: A is 16 x 4, B 4 x 8. Of A, lane t holds column t % 4 of rows t / 4 (`upper`)
// and t / 4 + 8 (`lower`); of B, row t % 4 of column t / 4 (`right`); of d, columns t % 4 * 2 and the next, of the same
// two rows one after the other. An element is a chain of four fused multiply-adds from d on, A's columns ascending: so
// it was found, bit for bit, on every architecture from Ampere to Blackwell (MMA-Sim, arXiv 2511.10909).
// The only assembly in the kernels: CUDA C++ has no name for this shape, and leaves open which lane holds what.
PSE_DEVICE void multiply_add_tiles(double (&d)[4], double upper, double lower, double right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
                 : "d"(upper), "d"(lower), "d"(right));
#else
    PSE_UNROLL
    for (int e = 0; e < 4; e += 2)
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                     : "+d"(d[e]), "+d"(d[e + 1])
                     : "d"(e == 0 ? upper : lower), "d"(right));
#endif
}

// ---- atomics: relaxed, integers of 32 and 64 bits; each returns the value before

template <class T>
struct Atomic;  // CUDA's own type of the same size
template <>
struct Atomic<int32_t> {
    using type = int;
};
template <>
struct Atomic<uint32_t> {
    using type = unsigned int;
};
template <>
struct Atomic<int64_t> {
    using type = unsigned long long;  // two's complement: sums are the same
};
template <>
struct Atomic<uint64_t> {
    using type = unsigned long long;
};

template <class T>
PSE_DEVICE T atomic_add(T* p, int64_t i, T value) {
    using A = typename Atomic<T>::type;
    return T(atomicAdd(reinterpret_cast<A*>(p + i), A(value)));
}
PSE_DEVICE int32_t atomic_max(int32_t* p, int64_t i, int32_t value) { return atomicMax(p + i, value); }
PSE_DEVICE int32_t atomic_min(int32_t* p, int64_t i, int32_t value) { return atomicMin(p + i, value); }
PSE_DEVICE uint32_t atomic_or(uint32_t* p, int64_t i, uint32_t value) { return atomicOr(p + i, value); }

// The last-block-done pattern, audited here and used from nowhere else. Every block of a set of `count` calls it once
// per launch; it is true, in all threads, of the block that comes last, and what the others wrote before they came is
// then visible. `tickets[i]` is 0 before the launch and again after it, so that a graph can be replayed.
PSE_DEVICE bool last_block(Global<uint32_t> tickets, int64_t i, uint32_t count) {
    __shared__ bool last;
    __syncthreads();  // the block's writes come before its thread 0's fence
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(tickets + i, 1u) == count - 1;
        if (last) tickets[i] = 0;
        __threadfence();  // and the fence before what any thread of the last block reads
    }
    __syncthreads();
    return last;
}

// ---- clusters: blocks that run at the same time and read each other's shared memory. From compute capability 9.0 on.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHaveClusters = true;
PSE_DEVICE int cluster_rank() { return int(cooperative_groups::this_cluster().block_rank()); }
PSE_DEVICE int cluster_size() { return int(cooperative_groups::this_cluster().num_blocks()); }

// A barrier of all threads of the cluster: what they wrote before it, in shared memory too, is read after it.
PSE_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }

// The array of the same name in the block of that rank, to be read. That block may leave the kernel only after a
// cluster_sync() that comes after the reads.
template <class T>
PSE_DEVICE const T* of_rank(T* p, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#else
// Below, a kernel's body is left out by `if constexpr (kHaveClusters)`; these only let it be parsed.
constexpr bool kHaveClusters = false;
PSE_DEVICE int cluster_rank() { return 0; }
PSE_DEVICE int cluster_size() { return 1; }
PSE_DEVICE void cluster_sync() { __trap(); }
template <class T>
PSE_DEVICE const T* of_rank(T* p, int) {
    return p;
}
#endif

PSE_DEVICE int count_bits(uint32_t x) { return __popc(x); }
PSE_DEVICE int count_bits(uint64_t x) { return __popcll((long long)(x)); }
PSE_DEVICE int count_leading_zeros(uint32_t x) { return __clz(int(x)); }
PSE_DEVICE int count_leading_zeros(uint64_t x) { return __clzll((long long)(x)); }

// ---- launches, on the host. Everything returns a cudaError_t as an int: 0 is success.

// Makes the target's device current for the length of a scope.
class OnDevice {
  public:
    explicit OnDevice(const Target& target) {
        error_ = int(cudaGetDevice(&before_));
        if (error_ == 0 && before_ != target.device) error_ = int(cudaSetDevice(target.device));
        changed_ = error_ == 0 && before_ != target.device;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    int error() const { return error_; }

  private:
    int before_ = 0;
    int error_ = 0;
    bool changed_ = false;
};

// What a launch says beside its size; `overlap` has room for one attribute.
inline int overlap_attribute(const Target& target, cudaLaunchAttribute* overlap) {
    if (!cuda::launches_overlap(target.device)) return 0;
    overlap->id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap->val.programmaticStreamSerializationAllowed = 1;
    return 1;
}

// Launches `blocks` blocks (nothing where there are none). The name is the harness's.
template <class... Parameters, class... Arguments>
int launch(const char*, const Target& target, int64_t blocks, int threads, void (*kernel)(Parameters...),
           Arguments... arguments) {
    if (blocks == 0) return 0;
    if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
    const OnDevice on(target);
    if (on.error() != 0) return on.error();
    cudaLaunchAttribute overlap = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = static_cast<cudaStream_t>(target.stream);
    config.attrs = &overlap;
    config.numAttrs = unsigned(overlap_attribute(target, &overlap));
    return int(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Launches `clusters` clusters of `size` blocks, at most 8, each with `bytes` of PSE_LAUNCHED_SHARED.
template <class... Parameters, class... Arguments>
int launch_clusters(const char*, const Target& target, int64_t clusters, int size, int threads, int64_t bytes,
                    void (*kernel)(Parameters...), Arguments... arguments) {
    if (clusters == 0) return 0;
    if (clusters * size > INT32_MAX) return int(cudaErrorInvalidConfiguration);
    const OnDevice on(target);
    if (on.error() != 0) return on.error();
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;  // 48 KB unless asked for
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, limit, int(bytes))) return int(error);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = unsigned(size);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(clusters * size));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(bytes);
    config.stream = static_cast<cudaStream_t>(target.stream);
    config.attrs = attributes;
    config.numAttrs = unsigned(1 + overlap_attribute(target, &attributes[1]));
    return int(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Bytes of PSE_LAUNCHED_SHARED that a block of `kernel` may have in a cluster on this device; 0 where the device has no
// clusters, or the kernel's code for it was made for an older one.
template <class... Parameters>
int64_t cluster_shared_limit(int device, void (*kernel)(Parameters...)) {
    const Target target = {device, nullptr};
    const OnDevice on(target);
    int clusters = 0, bytes = 0;
    cudaFuncAttributes code = {};
    const bool known = on.error() == 0 &&
                       cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
                       cudaFuncGetAttributes(&code, kernel) == cudaSuccess;
    if (!known) cudaGetLastError();  // it is not for the next launch to report
    return known && clusters != 0 && code.ptxVersion >= 90 ? bytes - int64_t(code.sharedSizeBytes) : 0;
}

inline int fill_zero(const Target& target, void* data, int64_t bytes) {
    const OnDevice on(target);
    if (on.error() != 0) return on.error();
    return int(cudaMemsetAsync(data, 0, size_t(bytes), static_cast<cudaStream_t>(target.stream)));
}

}  // namespace simt
}  // namespace pse
#endif
