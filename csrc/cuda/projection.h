// K2 on CUDA: the Gram matrix of k gradients, PCGrad in Gram space, and the combination (projection.cu).
// Device addresses, counts and tags; scratch from the caller; every launcher ends in the device's index and a
// cudaStream_t, and returns a cudaError_t as an int.
#pragma once
#include <stdint.h>

#include "core/dtype.h"
#include "core/pcgrad.h"

namespace pse {
namespace cuda {

constexpr int64_t kMostObjectives = 256;

// Which kernel forms the partial Gram sums of up to 16 objectives: all give the same bits. `automatic` is what callers
// want, tests the others.
enum class GramPath : int { automatic = 0, registers = 1, tiles = 2 };

// k gradients per group. Contiguous [groups, k, n] has its address in `grads`; k lists of tensors have one group and
// `table`, int64 on the device: addresses [k, tensors], then [tensors] each of output addresses, element counts and
// dtype tags, then [tensors + 1] cumulated blocks of kGramBlock elements.
struct ProjectionCall {
    int64_t grads = 0;
    int64_t table = 0;
    int64_t tensors = 1;
    int64_t groups = 1;
    int64_t k = 1;
    int64_t n = 0;
    int64_t blocks = 0;  // of kGramBlock elements per group, each tensor's rounded up
    DType dtype = DType::f32;
    int64_t gram = 0;     // out: fp64 [groups, k, k]
    int64_t scratch = 0;  // projection_scratch_bytes(), 16-byte aligned, in any state
    GramPath path = GramPath::automatic;

    // What project() needs beyond gram().
    int64_t weights = 0;  // fp64 [groups, k], or 0: all 1
    int64_t order = 0;    // uint16 [k, k - 1] where the mode is given
    uint64_t seed = 0;
    ProjectionOrder mode = ProjectionOrder::fixed;
    bool mean = false;
    int64_t projected = 0;  // out: fp64 [groups, k, k], coefficients of each projected gradient
    int64_t finite = 0;     // out: bool [groups]; where false the group's output is NaN
    int64_t out = 0;        // [groups, n]; 0 for lists
};

int64_t projection_scratch_bytes(int64_t groups, int64_t k, int64_t blocks);
int gram(const ProjectionCall& call, int device, void* stream);
int project(const ProjectionCall& call, int device, void* stream);

// Copies `count` words of host memory to the device inside kernel arguments: the host's copy is free at once, and a
// graph that records it owns what it needs.
int write_words(const int64_t* words, int64_t count, int64_t to, int device, void* stream);

}  // namespace cuda
}  // namespace pse
