// What the kernels of projection.cu share: what they see of a call, and where a block of columns lies.
#pragma once
#include "core/gram_order.h"
#include "cuda/projection.h"
#include "cuda/simt.cuh"

namespace pse {
namespace cuda {

using namespace simt;
using namespace PSE_ISA;

constexpr int kLanes = int(kGramLanes);
constexpr int64_t kInline = 16;   // objectives whose join and recurrence one block does in passing: 136 pairs
constexpr int kAnyOccupancy = 1;  // blocks per processor to compile for: left to itself, ptxas spills to fit one more

// Everything the kernels see.
struct Arrays {
    int64_t dense;  // address of [groups, k, n], or 0
    Global<const int64_t> table;
    int64_t tensors, groups, k, n, blocks, runs, pairs, tickets_per_group;
    DType dtype;
    Global<double> partials;   // [groups, blocks, pairs]
    Global<double> run_sums;   // [groups, runs, pairs]
    Global<uint32_t> tickets;  // [groups, tickets_per_group]: one per run or per chunk of pairs, the last the group's
    Global<double> gram;       // [groups, k, k]
    bool project;              // else the Gram matrix is all that is wanted
    Global<const double> weights;
    Global<const uint16_t> order;
    uint64_t seed;
    ProjectionOrder mode;
    bool mean;
    Global<double> projected;      // [groups, k, k]
    Global<uint8_t> finite;        // [groups]
    Global<double> coefficients;   // [groups, k] of the objectives that take part
    Global<int32_t> active;        // [groups, k]: those objectives
    Global<int32_t> active_count;  // [groups]
    int64_t out;                   // address of [groups, n], or 0
};

PSE_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
PSE_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PSE_DEVICE int larger(int a, int b) { return a > b ? a : b; }
PSE_HD int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

PSE_DEVICE double widened(float x) { return double(x); }
PSE_DEVICE double widened(double x) { return x; }
PSE_DEVICE double widened(f16_t x) { return double(f16_to_float(x.bits)); }
PSE_DEVICE double widened(bf16_t x) { return double(bf16_to_float(x.bits)); }

PSE_DEVICE void round_to(double x, float& out) { out = float(x); }
PSE_DEVICE void round_to(double x, double& out) { out = x; }
PSE_DEVICE void round_to(double x, f16_t& out) { out.bits = float_to_f16(float(x)); }
PSE_DEVICE void round_to(double x, bf16_t& out) { out.bits = float_to_bf16(float(x)); }

// N neighbouring elements of a row in a ring, which is of halfwords, at halfword `at`.
template <int N, class T>
PSE_DEVICE Vector<T, N> from_ring(Shared<uint16_t> ring, int at) {
    constexpr int kUnits = N * int(sizeof(T)) / 2;
    Vector<T, N> x;
    const Vector<uint16_t, kUnits> units = load_vector<kUnits>(ring, at);
    __builtin_memcpy(&x, &units, sizeof x);
    return x;
}

// The row of a pair in the order of pair_index().
PSE_DEVICE int64_t row_of_pair(int64_t pair) {
    int64_t row = 0;
    while (pairs_of(row + 1) <= pair) ++row;
    return row;
}

// ---- where a block of columns lies

struct Piece {
    int64_t tensor;
    int64_t start;  // within the tensor
    int64_t size;   // of the tensor
    int count;
    DType dtype;
};

PSE_DEVICE Piece piece_of(const Arrays& a, int64_t block_of_columns) {
    Piece piece = {0, block_of_columns * kGramBlock, a.n, 0, a.dtype};
    if (a.table != nullptr) {
        const int64_t counts = (a.k + 1) * a.tensors, dtypes = counts + a.tensors, first_block = dtypes + a.tensors;
        int64_t low = 0, high = a.tensors;  // first_block[low] <= block < first_block[high]
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (load(a.table, first_block + middle) <= block_of_columns ? low : high) = middle;
        }
        piece.tensor = low;
        piece.start = (block_of_columns - load(a.table, first_block + low)) * kGramBlock;
        piece.size = load(a.table, counts + low);
        piece.dtype = DType(load(a.table, dtypes + low));
    }
    piece.count = int(smaller(kGramBlock, piece.size - piece.start));
    return piece;
}

// Address of a row's first element within the piece.
PSE_DEVICE int64_t row_address(const Arrays& a, const Piece& piece, int64_t group, int64_t objective) {
    const int64_t row = a.table != nullptr ? load(a.table, objective * a.tensors + piece.tensor)
                                           : a.dense + (group * a.k + objective) * a.n * dtype_size(piece.dtype);
    return row + piece.start * dtype_size(piece.dtype);
}
PSE_DEVICE int64_t out_address(const Arrays& a, const Piece& piece, int64_t group) {
    const int64_t row = a.table != nullptr ? load(a.table, a.k * a.tensors + piece.tensor)
                                           : a.out + group * a.n * dtype_size(piece.dtype);
    return row + piece.start * dtype_size(piece.dtype);
}

}  // namespace cuda
}  // namespace pse
