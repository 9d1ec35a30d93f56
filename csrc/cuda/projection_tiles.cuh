// 1 of projection.cu where it is few blocks of columns: tiles of pairs over rows staged in shared memory, so that many
// threads share a block's chain of sums.
#pragma once
#include "cuda/projection_join.cuh"

namespace pse {
namespace cuda {

// A thread block takes all rows of one block of columns, kColumns at a time.
template <int tile, int rows, int columns, int threads>
struct TileShape {
    static constexpr int kTile = tile;  // kTile^2 sums in registers for 2 kTile loads from shared memory
    static constexpr int kRows = rows;  // at most
    static constexpr int kColumns = columns;
    static constexpr int kThreads = threads;
    static constexpr int kSide = rows / tile;
    // Rows of 8 lanes, one row free behind each tile, an odd number in all: tiles, and steps, then meet in other banks.
    static constexpr int kStride = (rows + kSide) | 1;
    static constexpr int kSlab = columns / kLanes * kStride * kLanes;
    static constexpr int kFetched = rows * columns / threads;  // values per thread and slab
    static_assert(columns % threads == 0, "the threads fetch from one row");
    static_assert(kSide * (kSide + 1) / 2 * kLanes <= threads, "a thread per tile and lane");
    static_assert(kSlab * 8 <= 42 << 10, "static shared memory, beside the recurrence's");
};
// Slabs as long as memory takes to answer: a slab's sums are a chain of columns / 8 steps of 8 to 16 cycles.
using FewColumns = TileShape<2, 6, 512, 256>;  // 4 sums a thread
using MoreRows = TileShape<4, 16, 256, 256>;   // 16 sums: half the loads from shared memory per product

struct Tile {
    int left, right;  // where its rows begin in the slab
    bool active;
};

// Of a column's element in the slab. Rows of one tile are kLanes apart, so a thread adds constants to what it knows of
// its tile: computed per element, this was more instructions than the sums.
template <class Shape>
PSE_HD constexpr int slab_index(int row, int column) {
    return (column / kLanes * Shape::kStride + row + row / Shape::kTile) * kLanes + column % kLanes;
}

// Element u of a thread's share of a slab.
template <class Shape>
struct Fetched {
    static constexpr int kOfRow = Shape::kColumns / Shape::kThreads;
    PSE_METHOD static int row(int u) { return u / kOfRow; }
    PSE_METHOD static int column(int u) { return u % kOfRow * Shape::kThreads + thread(); }
    PSE_METHOD static int index(int u) {
        return slab_index<Shape>(0, thread()) + slab_index<Shape>(row(u), u % kOfRow * Shape::kThreads);
    }
};

// A thread's values of the slab that begins at `start`; zeros beyond the columns leave every sum as it is.
template <class Shape, class T>
PSE_DEVICE void fetch_slab(Shared<int64_t> addresses, int mine, int count, int start, T* raw) {
    PSE_UNROLL
    for (int u = 0; u < Shape::kFetched; ++u) {
        const int column = start + Fetched<Shape>::column(u);
        raw[u] = T{};
        if (u < mine && column < count)
            raw[u] = load(streamed<const T>(load(addresses, Fetched<Shape>::row(u)), count), column);
    }
}

template <class Shape, class T>
PSE_DEVICE void add_tiles(const Piece& piece, Shared<int64_t> addresses, int rows, Shared<double> slab,
                          const Tile& tile, double* sum) {
    constexpr bool kExact = sizeof(T) < 8;
    constexpr int kTile = Shape::kTile;
    constexpr bool kAhead = sizeof(T) < 8 || kTile < 4;  // the next values would spill beside so many sums
    const int mine = rows * Fetched<Shape>::kOfRow;
    T raw[Shape::kFetched];
    if (kAhead) fetch_slab<Shape, T>(addresses, mine, piece.count, 0, raw);
    for (int start = 0; start < piece.count; start += Shape::kColumns) {
        if (!kAhead) fetch_slab<Shape, T>(addresses, mine, piece.count, start, raw);
        PSE_UNROLL
        for (int u = 0; u < Shape::kFetched; ++u) {
            if (u < mine) store(slab, Fetched<Shape>::index(u), widened(raw[u]));
        }
        sync_block();
        // In flight during the sums.
        if (kAhead) fetch_slab<Shape, T>(addresses, mine, piece.count, start + Shape::kColumns, raw);
        const int steps = (smaller(Shape::kColumns, piece.count - start) + kLanes - 1) / kLanes;
        for (int step = 0; step < steps && tile.active; ++step) {
            const int at = step * Shape::kStride * kLanes + thread() % kLanes;
            double x[kTile];
            PSE_UNROLL
            for (int i = 0; i < kTile; ++i) x[i] = load(slab, tile.left + at + i * kLanes);
            PSE_UNROLL
            for (int j = 0; j < kTile; ++j) {
                const double y = load(slab, tile.right + at + j * kLanes);
                PSE_UNROLL
                for (int i = 0; i < kTile; ++i) sum[i * kTile + j] = add_product<kExact>(sum[i * kTile + j], x[i], y);
            }
        }
        sync_block();
    }
}

template <class Shape>
PSE_KERNEL(Shape::kThreads, kAnyOccupancy)
gram_tiles(Arrays a) {
    after_earlier_launches();
    constexpr int kTile = Shape::kTile;
    PSE_SHARED(int64_t, addresses, Shape::kRows);
    PSE_SHARED(double, slab, Shape::kSlab);
    const int k = int(a.k);
    const int64_t block_of_columns = block() % a.blocks, group = block() / a.blocks;
    const Piece piece = piece_of(a, block_of_columns);
    for (int r = thread(); r < k; r += Shape::kThreads) store(addresses, r, row_address(a, piece, group, r));
    // The last tile's rows beyond k: their sums are of no use, but they are read.
    const int padding = (kTile - k % kTile) % kTile;
    for (int e = thread(); e < padding * Shape::kColumns; e += Shape::kThreads)
        store(slab, slab_index<Shape>(k + e / Shape::kColumns, e % Shape::kColumns), 0.0);
    const int t = thread() / kLanes;
    const int tile_row = int(row_of_pair(t));
    const int left = tile_row * kTile, right = (t - int(pairs_of(tile_row))) * kTile;
    const Tile tile = {slab_index<Shape>(left, 0), slab_index<Shape>(right, 0), left < k};

    double sum[kTile * kTile];
    PSE_UNROLL
    for (int p = 0; p < kTile * kTile; ++p) sum[p] = 0.0;
    sync_block();
    switch (piece.dtype) {
        case DType::f32: add_tiles<Shape, float>(piece, addresses, k, slab, tile, sum); break;
        case DType::f64: add_tiles<Shape, double>(piece, addresses, k, slab, tile, sum); break;
        case DType::f16: add_tiles<Shape, f16_t>(piece, addresses, k, slab, tile, sum); break;
        case DType::bf16: add_tiles<Shape, bf16_t>(piece, addresses, k, slab, tile, sum); break;
    }
    const int64_t partial = (group * a.blocks + block_of_columns) * a.pairs;
    PSE_UNROLL
    for (int p = 0; p < kTile * kTile; ++p) {
        const double joined = join_lanes_of_threads(sum[p]);
        const int i = left + p / kTile, j = right + p % kTile;
        if (tile.active && thread() % kLanes == p % kLanes && i < k && j <= i)
            store(a.partials, partial + pair_index(i, j), joined);
    }
    const int64_t run = block_of_columns / kGramRun;
    join_inline(a, group, run, smaller(kGramRun, a.blocks - run * kGramRun));
}

}  // namespace cuda
}  // namespace pse
