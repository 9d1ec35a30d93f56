// Gram-space PCGrad: 2kN elements read, N written, however many projections happen.
//   gram     per block of kBlock elements: kLanes interleaved sums per pair, joined in a fixed tree; then runs of
//            blocks, then the runs, all in order (core/gram_order.h)
//   recur    k-vectors in fp64 (core/pcgrad.h)
//   combine  out = sum_j c_j g_j in fp64, j ascending, unfused, rounded once (16-bit types through fp32)
// Blocks start anew in each tensor, and sums belong to blocks, never to threads: the same bits for any thread count.
#include "cpu/projection.h"

#include "core/gram_order.h"
#include "cpu/convert.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace pse {
namespace PSE_ISA {

constexpr int64_t kBlock = kGramBlock;
constexpr int64_t kLanes = kGramLanes;
constexpr int kParts = kLanes / kWidth;
constexpr int kVectors = kWidth == 8 ? 32 : 16;  // architectural registers
// Up to here all pairs stay in registers beside one vector of each row: 21 + 6 of 32, 10 + 4 of 16.
constexpr int kRegisterRows = kVectors == 32 ? 6 : 4;
// Beyond: tiles of kTile rows by kTileColumns rows of a slab converted to fp64. 16 + 5 of 32, 8 + 5 of 16.
constexpr int kTile = 4;
constexpr int kTileColumns = kVectors == 32 ? 4 : 2;
constexpr int64_t kSlab = 256;  // columns: k = 16 stays within 32 KB

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t blocks_of(const Gradients& grads) { return grads.first_block[grads.tensors]; }

// ---- scratch: partial sums of every block, then one workspace per thread

struct Workspace {
    double* slab;       // [rows, kSlab], rows = k rounded up to kTile
    double* sums;       // [tiles, kTile * kTile, kLanes]; a diagonal tile uses its lower triangle, packed
    double* active;     // [k] coefficients of the rows that take part
    const void** rows;  // [k]
    int64_t* order;     // [k]
};

static int64_t workspace_bytes(int64_t k) {
    const int64_t tiles = pairs_of(round_up(k, kTile) / kTile);
    return 8 * (round_up(k, kTile) * kSlab + tiles * kTile * kTile * kLanes + 3 * round_up(k, 8));
}

static Workspace workspace(char* scratch, int64_t k, int thread) {
    const int64_t rows = round_up(k, kTile), tiles = pairs_of(rows / kTile);
    double* base = reinterpret_cast<double*>(scratch + thread * workspace_bytes(k));
    double* active = base + rows * kSlab + tiles * kTile * kTile * kLanes;
    return {base, base + rows * kSlab, active, reinterpret_cast<const void**>(active + round_up(k, 8)),
            reinterpret_cast<int64_t*>(active + 2 * round_up(k, 8))};
}

static int64_t partial_bytes(const Gradients& grads) {
    return round_up(grads.groups * blocks_of(grads) * pairs_of(grads.k) * 8, 64);
}

static int64_t scratch_bytes(const Gradients& grads, int threads) {
    return partial_bytes(grads) + threads * workspace_bytes(grads.k);
}

// Fork and join cost more than they save below this many streamed elements.
static int useful_threads(int64_t elements, int threads) { return elements < (1 << 15) ? 1 : threads; }

static int64_t elements_of(const Gradients& grads) {
    int64_t per_row = 0;
    for (int64_t t = 0; t < grads.tensors; ++t) per_row += grads.counts[t];
    return grads.groups * grads.k * per_row;
}

// Runs of blocks go to threads by a shared counter; body(workspace, block) for every block. Always ascending inside a
// run, which the hardware prefetchers follow across rows (descending: 4 ms more of 13 at k = 5, N = 2e7).
enum class Runs { first_to_last, last_to_first };
template <class Body>
static inline void for_blocks(int64_t blocks, int64_t k, char* scratch, int threads, const Body& body,
                              Runs runs = Runs::first_to_last) {
    const int64_t run = blocks / (threads * 16) < 1 ? 1 : min64(blocks / (threads * 16), 16);
    int64_t next = 0;
    auto team = [&](int thread, int) {
        const Workspace space = workspace(scratch, k, thread);
        for (;;) {
            const int64_t taken = __atomic_fetch_add(&next, run, __ATOMIC_RELAXED);
            if (taken >= blocks) return;
            const int64_t count = min64(run, blocks - taken);
            const int64_t first = runs == Runs::first_to_last ? taken : blocks - taken - count;
            for (int64_t block = first; block < first + count; ++block) body(space, block);
        }
    };
    parallel_team(threads, team);
}

// ---- where a block lies

struct Place {
    DType dtype;
    int64_t tensor;
    int64_t group;
    int64_t start;  // within the tensor
    int64_t count;
};

static Place place_of(const Gradients& grads, int64_t block) {
    const int64_t per_group = blocks_of(grads), within = block % per_group;
    int64_t low = 0, high = grads.tensors;  // first_block[low] <= within < first_block[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (grads.first_block[middle] <= within ? low : high) = middle;
    }
    const int64_t start = (within - grads.first_block[low]) * kBlock;
    return {DType(grads.dtypes[low]), low, block / per_group, start, min64(kBlock, grads.counts[low] - start)};
}

static const void* row_of(const Gradients& grads, const Place& place, int64_t objective) {
    const int64_t size = dtype_size(place.dtype);
    if (grads.table != nullptr)
        return reinterpret_cast<const char*>(grads.table[objective * grads.tensors + place.tensor]) +
               place.start * size;
    return grads.dense + ((place.group * grads.k + objective) * grads.counts[0] + place.start) * size;
}

// ---- gram

// All pairs of K rows over n columns (a multiple of kLanes), added to sums [pairs, kLanes].
template <int K, bool kExact, class T>
static inline void gram_rows(const T* const* rows, int64_t n, double* sums) {
    for (int part = 0; part < kParts; ++part) {
        Doubles sum[K * (K + 1) / 2];
        double* lanes = sums + part * kWidth;
        for (int p = 0; p < K * (K + 1) / 2; ++p) sum[p] = load_lanes(lanes + p * kLanes);
        for (int64_t column = part * kWidth; column < n; column += kLanes) {
            Doubles x[K];
#pragma GCC unroll 8
            for (int i = 0; i < K; ++i) {
                x[i] = load_lanes(rows[i] + column);
#pragma GCC unroll 8
                for (int j = 0; j <= i; ++j)
                    sum[i * (i + 1) / 2 + j] = accumulate<kExact>(x[i], x[j], sum[i * (i + 1) / 2 + j]);
            }
        }
        for (int p = 0; p < K * (K + 1) / 2; ++p) store_lanes(sum[p], lanes + p * kLanes);
    }
}

// kTile rows against kColumns others of the slab, added to sums [kTile, kTile, kLanes].
template <int kColumns, bool kExact>
static inline void gram_tile(const double* left, const double* right, int64_t n, double* sums) {
    for (int part = 0; part < kParts; ++part) {
        Doubles sum[kTile][kColumns];
        double* lanes = sums + part * kWidth;
        for (int i = 0; i < kTile; ++i)
            for (int j = 0; j < kColumns; ++j) sum[i][j] = load_lanes(lanes + (i * kTile + j) * kLanes);
        for (int64_t column = part * kWidth; column < n; column += kLanes) {
            Doubles x[kTile];
#pragma GCC unroll 8
            for (int i = 0; i < kTile; ++i) x[i] = load_lanes(left + i * kSlab + column);
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; ++j) {
                const Doubles y = load_lanes(right + j * kSlab + column);
#pragma GCC unroll 8
                for (int i = 0; i < kTile; ++i) sum[i][j] = accumulate<kExact>(x[i], y, sum[i][j]);
            }
        }
        for (int i = 0; i < kTile; ++i)
            for (int j = 0; j < kColumns; ++j) store_lanes(sum[i][j], lanes + (i * kTile + j) * kLanes);
    }
}

template <int K, class T>
static void gram_block_rows(const void* const* rows, int64_t n, double* partial) {
    constexpr bool kExact = sizeof(T) < 8;
    constexpr int64_t kPiece = kParts == 1 ? kBlock : 512;  // several parts: the second finds the piece in L1
    alignas(64) double sums[K * (K + 1) / 2 * kLanes] = {};
    const T* at[K];
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t start = 0; start < whole; start += kPiece) {
        for (int i = 0; i < K; ++i) at[i] = static_cast<const T*>(rows[i]) + start;
        gram_rows<K, kExact>(at, min64(kPiece, whole - start), sums);
    }
    if (whole < n) {  // zeros behind the end leave every sum as it is: no sum is ever -0
        T tail[K][kLanes] = {};
        for (int i = 0; i < K; ++i) {
            __builtin_memcpy(tail[i], static_cast<const T*>(rows[i]) + whole, (n - whole) * sizeof(T));
            at[i] = tail[i];
        }
        gram_rows<K, kExact>(at, kLanes, sums);
    }
    for (int p = 0; p < K * (K + 1) / 2; ++p) partial[p] = join_lanes(sums + p * kLanes);
}

// The next slab of a row, asked for while this one is worked on: k runs of 1 KB are too short for the hardware.
// Behind the end of the row it is a hint and no access.
static inline void prefetch_slab(const void* row, int64_t offset, int64_t bytes) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(row) + uintptr_t(offset);
    for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(from + uintptr_t(line)));
}

template <bool kExact>
static void gram_block_tiles(const Workspace& space, DType dtype, int64_t k, int64_t n, double* partial) {
    const int64_t rows = round_up(k, kTile), tiles = rows / kTile;
    for (int64_t s = 0; s < pairs_of(tiles) * kTile * kTile * kLanes; ++s) space.sums[s] = 0.0;
    for (int64_t start = 0; start < n; start += kSlab) {
        const int64_t count = min64(kSlab, n - start), padded = round_up(count, kLanes);
        for (int64_t i = 0; i < rows; ++i) {
            double* row = space.slab + i * kSlab;
            if (i < k) {
                load_block(space.rows[i], dtype, start, count, row);
                prefetch_slab(space.rows[i], (start + kSlab) * dtype_size(dtype), kSlab * dtype_size(dtype));
            }
            for (int64_t c = i < k ? count : 0; c < padded; ++c) row[c] = 0.0;
        }
        for (int64_t i = 0; i < tiles; ++i) {
            const double* left = space.slab + i * kTile * kSlab;
            for (int64_t j = 0; j < i; ++j)
                for (int part = 0; part < kTile; part += kTileColumns)
                    gram_tile<kTileColumns, kExact>(left, space.slab + (j * kTile + part) * kSlab, padded,
                                                    space.sums + (pair_index(i, j) * kTile * kTile + part) * kLanes);
            const double* const diagonal[kTile] = {left, left + kSlab, left + 2 * kSlab, left + 3 * kSlab};
            gram_rows<kTile, kExact>(diagonal, padded, space.sums + pair_index(i, i) * kTile * kTile * kLanes);
        }
    }
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            const int64_t tile = pair_index(i / kTile, j / kTile), row = i % kTile, column = j % kTile;
            const int64_t within = i / kTile == j / kTile ? pair_index(row, column) : row * kTile + column;
            partial[pair_index(i, j)] = join_lanes(space.sums + (tile * kTile * kTile + within) * kLanes);
        }
}

template <int K>
static void gram_block_dtype(const void* const* rows, DType dtype, int64_t n, double* partial) {
    switch (dtype) {
        case DType::f32: return gram_block_rows<K, float>(rows, n, partial);
        case DType::f64: return gram_block_rows<K, double>(rows, n, partial);
        case DType::f16: return gram_block_rows<K, f16_t>(rows, n, partial);
        case DType::bf16: return gram_block_rows<K, bf16_t>(rows, n, partial);
    }
}

template <int K>
static void gram_block_small(const Workspace& space, DType dtype, int64_t k, int64_t n, double* partial) {
    if constexpr (K > 0) {
        if (k == K) return gram_block_dtype<K>(space.rows, dtype, n, partial);
        return gram_block_small<K - 1>(space, dtype, k, n, partial);
    }
}

static void gram(const Gradients& grads, double* out, char* scratch, int threads) {
    const int64_t k = grads.k, pairs = pairs_of(k), per_group = blocks_of(grads);
    double* partials = reinterpret_cast<double*>(scratch);
    threads = useful_threads(elements_of(grads), threads);
    for_blocks(grads.groups * per_group, k, scratch + partial_bytes(grads), threads,
               [&](const Workspace& space, int64_t block) {
                   const Place place = place_of(grads, block);
                   for (int64_t i = 0; i < k; ++i) space.rows[i] = row_of(grads, place, i);
                   double* partial = partials + block * pairs;
                   if (k <= kRegisterRows)
                       gram_block_small<kRegisterRows>(space, place.dtype, k, place.count, partial);
                   else if (place.dtype == DType::f64)
                       gram_block_tiles<false>(space, place.dtype, k, place.count, partial);
                   else
                       gram_block_tiles<true>(space, place.dtype, k, place.count, partial);
               });
    // Join runs of blocks, then the runs, row by row of the lower triangle.
    parallel_for(grads.groups * k, useful_threads(grads.groups * per_group * pairs, threads), [&](int64_t task) {
        const int64_t group = task / k, i = task % k;
        const double* part = partials + group * per_group * pairs + pair_index(i, 0);
        double* row = out + (group * k + i) * k;
        for (int64_t j = 0; j <= i; ++j) row[j] = 0.0;
        for (int64_t first = 0; first < per_group; first += kGramRun) {
            const int64_t end = min64(first + kGramRun, per_group);
            for (int64_t start = 0; start <= i; start += kLanes) {  // a cache line of each block's sums at a time
                const int64_t count = min64(kLanes, i + 1 - start);
                double run[kLanes] = {};
                for (int64_t block = first; block < end; ++block)
                    for (int64_t j = 0; j < count; ++j) run[j] += part[block * pairs + start + j];
                for (int64_t j = 0; j < count; ++j) row[start + j] += run[j];
            }
        }
        for (int64_t j = 0; j < i; ++j) out[(group * k + j) * k + i] = row[j];
    });
}

// ---- recur

static bool recur(const Recurrence& r, int64_t groups, int64_t k, char* scratch, int threads) {
    int64_t bad = 0;
    threads = useful_threads(groups * k * k * k, threads);
    for_blocks(groups * k, k, scratch, threads, [&](const Workspace& space, int64_t task) {
        const int64_t group = task / k, i = task % k;
        const double* gram = r.gram + group * k * k;
        const double* weights = r.weights == nullptr ? nullptr : r.weights + group * k;
        const double norm = gram[i * k + i];
        if (takes_part(weights, i) && !(norm - norm == 0.0)) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        const int64_t* order = nullptr;
        if (r.mode == ProjectionOrder::given) order = r.order + i * (k - 1);
        if (r.mode == ProjectionOrder::random) {
            draw_order(r.seed, uint64_t(group), i, k, space.order);
            order = space.order;
        }
        project_objective(gram, weights, order, i, k, r.projected + task * k);
    });
    for_blocks(groups * k, k, scratch, threads, [&](const Workspace&, int64_t task) {
        const int64_t group = task / k, m = task % k;
        const double* weights = r.weights == nullptr ? nullptr : r.weights + group * k;
        r.combined[task] = combined_coefficient(r.projected + group * k * k, weights, m, k, r.mean);
    });
    return bad == 0;
}

// ---- combine

constexpr int kUnroll = 4;          // independent sums hide the latency of multiply and add
constexpr uintptr_t kAhead = 2048;  // bytes: saves 5 % at k = 5, N = 2e7. Behind the end it is a hint, no access

template <class T>
static inline void store_group(const Doubles* sum, T* out) {
    float staged[kUnroll * kWidth];
    for (int u = 0; u < kUnroll; ++u) store_lanes(sum[u], staged + u * kWidth);
    for (int i = 0; i < kUnroll * kWidth; ++i) store_element(staged[i], out + i);
}
static inline void store_group(const Doubles* sum, double* out) {
    for (int u = 0; u < kUnroll; ++u) store_lanes(sum[u], out + u * kWidth);
}
static inline void store_group(const Doubles* sum, float* out) {
    for (int u = 0; u < kUnroll; ++u) store_lanes(sum[u], out + u * kWidth);
}

template <class T>
static inline void combine_group(const T* const* rows, const double* c, int64_t k, int64_t column, T* out) {
    Doubles sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = splat(-0.0);  // -0 + x is x: a lone -0 keeps its sign
    for (int64_t j = 0; j < k; ++j) {
        const Doubles factor = splat(c[j]);
        const uintptr_t ahead = reinterpret_cast<uintptr_t>(rows[j] + column) + kAhead;
        for (uintptr_t line = 0; line < kUnroll * kWidth * sizeof(T); line += 64)
            __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
        for (int u = 0; u < kUnroll; ++u) sum[u] += factor * load_lanes(rows[j] + column + u * kWidth);
    }
    store_group(sum, out);
}

template <class T>
static void combine_block(const void** untyped, const double* c, int64_t k, int64_t n, T* out) {
    constexpr int64_t kStep = kUnroll * kWidth;
    const T* const* rows = reinterpret_cast<const T* const*>(untyped);
    if (k == 0) return void(__builtin_memset(out, 0, n * sizeof(T)));
    int64_t column = 0;
    for (; column + kStep <= n; column += kStep) combine_group(rows, c, k, column, out + column);
    if (column == n) return;
    T tail[kStep] = {}, result[kStep];
    Doubles sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = splat(-0.0);
    for (int64_t j = 0; j < k; ++j) {
        __builtin_memcpy(tail, rows[j] + column, (n - column) * sizeof(T));
        for (int u = 0; u < kUnroll; ++u) sum[u] += splat(c[j]) * load_lanes(tail + u * kWidth);
    }
    store_group(sum, result);
    __builtin_memcpy(out + column, result, (n - column) * sizeof(T));
}

static void combine(const Gradients& grads, const double* combined, const double* weights, const uint64_t* out,
                    char* scratch, int threads) {
    const int64_t k = grads.k, blocks = grads.groups * blocks_of(grads);
    threads = useful_threads(elements_of(grads), threads);
    const auto body = [&](const Workspace& space, int64_t block) {
        const Place place = place_of(grads, block);
        int64_t active = 0;
        for (int64_t j = 0; j < k; ++j) {
            if (!takes_part(weights == nullptr ? nullptr : weights + place.group * k, j)) continue;
            space.rows[active] = row_of(grads, place, j);
            space.active[active++] = combined[place.group * k + j];
        }
        char* to = reinterpret_cast<char*>(out[place.tensor]) +
                   (place.group * grads.counts[place.tensor] + place.start) * dtype_size(place.dtype);
        switch (place.dtype) {
            case DType::f32:
                return combine_block(space.rows, space.active, active, place.count, reinterpret_cast<float*>(to));
            case DType::f64:
                return combine_block(space.rows, space.active, active, place.count, reinterpret_cast<double*>(to));
            case DType::f16:
                return combine_block(space.rows, space.active, active, place.count, reinterpret_cast<f16_t*>(to));
            case DType::bf16:
                return combine_block(space.rows, space.active, active, place.count, reinterpret_cast<bf16_t*>(to));
        }
    };
    for_blocks(blocks, k, scratch, threads, body, Runs::last_to_first);  // the Gram pass left the last ones in cache
}

extern const ProjectionKernels projection_kernels;
const ProjectionKernels projection_kernels = {kBlock, scratch_bytes, gram, recur, combine};

}  // namespace PSE_ISA
}  // namespace pse
