// 1 of projection.cu for many objectives: tiles of 16 x 8 pairs by the tensor cores, which add in fp64 and in order.
//
// A thread block takes kSuper rows against kSuper rows of one block of columns, each of its four warps two of the eight
// lanes, for which it has all tiles. Rows come through a ring in shared memory, a line of each at a time.
#pragma once
#include "cuda/projection_view.cuh"

namespace pse {
namespace cuda {

struct Super {
    static constexpr int kSuper = 32;
    static constexpr int kLefts = kSuper / 16, kRights = kSuper / 8;  // groups of rows: tiles are lefts x rights
    static constexpr int kOwn = 2;                                    // lanes of a warp
    static constexpr int kWarps = kLanes / kOwn;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kStaged = 2 * kSuper;  // on the diagonal the first kSuper are left and right rows
    static constexpr int kLine = 128;           // bytes of one row
    // Halfwords in the ring: an odd number of 16 bytes, of which a group's rows then meet eight different ones. A
    // warp's lanes are a part of each, so a load takes four accesses.
    static constexpr int kRow = kLine / 2 + 8;
    static constexpr int kStage = kStaged * kRow;
    static constexpr int kStages = 4;
    static constexpr int kCopies = kLine / 16;          // per row
    static constexpr int kAtOnce = kThreads / kCopies;  // rows that the threads copy
    static constexpr int kRounds = kStaged / kAtOnce;   // copies of a thread per line
    static constexpr int kSums = kLefts * kRights * kOwn * 4;
    static_assert(kSums * kThreads / 2 * 4 <= kStages * kStage, "the ring holds half of the sums, as fp64");
};
using TileSums = double[Super::kLefts][Super::kRights][Super::kOwn][4];

// The pairs of a thread block.
struct Tiles {
    int left, right;  // first rows, of all objectives
    int staged_left;  // row of the ring; right rows begin at 0
    uint32_t active;  // a bit per tile: has pairs on or below the diagonal
    PSE_METHOD bool has(int i, int j) const { return active >> (i * Super::kRights + j) & 1; }
};

template <class T>
PSE_DEVICE void to_ring(Shared<uint16_t> ring, int at, T x) {
    constexpr int kUnits = int(sizeof(T)) / 2;
    Vector<uint16_t, kUnits> units;
    __builtin_memcpy(&units, &x, sizeof x);
    store_vector<kUnits>(ring, at, units);
}

// Starts the copies of a line, of 16 or of 4 bytes. What is left, ends of rows and crooked rows of 16-bit elements, is
// stored at once, with zeros beyond the end.
template <class T>
PSE_DEVICE void fill_line(const Piece& piece, Shared<int64_t> addresses, int rows, int width, Shared<uint16_t> ring,
                          int line) {
    constexpr int kUnits = int(sizeof(T)) / 2, kElements = 8 / kUnits;
    const int first_row = thread() / Super::kCopies, in_line = thread() % Super::kCopies * 8;
    const int unit = line * Super::kLine / 2 + in_line, units = piece.count * kUnits;
    const int slot = line % Super::kStages * Super::kStage + in_line;
    PSE_UNROLL
    for (int u = 0; u < Super::kRounds; ++u) {
        const int row = first_row + u * Super::kAtOnce, at = slot + row * Super::kRow;
        if (row >= rows || unit - in_line >= units) continue;
        const int64_t address = load(addresses, row);
        const Global<const uint16_t> from = streamed<const uint16_t>(address, units);
        if (unit + 8 <= units && width == 16) {
            copy_async<8>(ring, at, from, unit);
        } else if (unit + 8 <= units && width == 4) {
            PSE_UNROLL
            for (int e = 0; e < 8; e += 2) copy_async<2>(ring, at + e, from, unit + e);
        } else {
            T x[kElements] = {};
            PSE_UNROLL
            for (int e = 0; e < kElements; ++e)
                if (unit / kUnits + e < piece.count)
                    x[e] = load(streamed<const T>(address, piece.count), unit / kUnits + e);
            PSE_UNROLL
            for (int e = 0; e < kElements; ++e) to_ring(ring, at + e * kUnits, x[e]);
        }
    }
    commit_copies();
}

// A line of elements whose products are exact: four columns of each lane at a time.
template <class T>
PSE_DEVICE void multiply_line(Shared<uint16_t> ring, const Tiles& tiles, TileSums& sum) {
    constexpr int kUnits = int(sizeof(T)) / 2, kSteps = Super::kLine / (4 * kLanes * int(sizeof(T)));
    for (int step = 0; step < kSteps; ++step) {
        const int column = (step * 4 + lane() % 4) * kLanes + warp() * Super::kOwn;
        const int at = lane() / 4 * Super::kRow + column * kUnits;
        const auto rows = [&](int first) { return from_ring<Super::kOwn, T>(ring, at + first * Super::kRow); };
        Vector<T, Super::kOwn> left[2 * Super::kLefts], right[Super::kRights];
        PSE_UNROLL
        for (int g = 0; g < 2 * Super::kLefts; ++g) left[g] = rows(tiles.staged_left + 8 * g);
        PSE_UNROLL
        for (int j = 0; j < Super::kRights; ++j) right[j] = rows(8 * j);
        PSE_UNROLL
        for (int v = 0; v < Super::kOwn; ++v) {
            double of_left[2 * Super::kLefts];
            PSE_UNROLL
            for (int g = 0; g < 2 * Super::kLefts; ++g) of_left[g] = widened(left[g].at[v]);
            PSE_UNROLL
            for (int j = 0; j < Super::kRights; ++j) {
                const double of_right = widened(right[j].at[v]);
                PSE_UNROLL
                for (int i = 0; i < Super::kLefts; ++i)
                    if (tiles.has(i, j)) multiply_add_tiles(sum[i][j][v], of_left[2 * i], of_left[2 * i + 1], of_right);
            }
        }
    }
}

// fp64, whose products are rounded before they are added, and so not for the tensor cores: a thread adds the same sums.
PSE_DEVICE void add_line_of_doubles(Shared<uint16_t> ring, const Tiles& tiles, TileSums& sum) {
    for (int step = 0; step < Super::kLine / (kLanes * 8); ++step) {
        PSE_UNROLL
        for (int v = 0; v < Super::kOwn; ++v) {
            const int at = (step * kLanes + warp() * Super::kOwn + v) * 4;
            const auto of_row = [&](int row) { return from_ring<1, double>(ring, row * Super::kRow + at).at[0]; };
            double left[2 * Super::kLefts];
            PSE_UNROLL
            for (int g = 0; g < 2 * Super::kLefts; ++g) left[g] = of_row(tiles.staged_left + 8 * g + lane() / 4);
            PSE_UNROLL
            for (int j = 0; j < Super::kRights; ++j) {
                const double right[2] = {of_row(8 * j + lane() % 4 * 2), of_row(8 * j + lane() % 4 * 2 + 1)};
                PSE_UNROLL
                for (int i = 0; i < Super::kLefts; ++i) {
                    if (!tiles.has(i, j)) continue;
                    PSE_UNROLL
                    for (int e = 0; e < 4; ++e)
                        sum[i][j][v][e] = add_product<false>(sum[i][j][v][e], left[2 * i + e / 2], right[e % 2]);
                }
            }
        }
    }
}

template <class T>
PSE_DEVICE void add_piece(const Piece& piece, Shared<int64_t> addresses, int rows, int width, Shared<uint16_t> ring,
                          const Tiles& tiles, TileSums& sum) {
    const int lines = int(divide_up(piece.count * int(sizeof(T)), Super::kLine));
    for (int line = 0; line < Super::kStages - 1; ++line) fill_line<T>(piece, addresses, rows, width, ring, line);
    for (int line = 0; line < lines; ++line) {
        wait_copies<Super::kStages - 2>();
        sync_block();  // the line is there, and the one before has been read
        fill_line<T>(piece, addresses, rows, width, ring, line + Super::kStages - 1);
        const Shared<uint16_t> slot = ring + line % Super::kStages * Super::kStage;
        if constexpr (sizeof(T) < 8)
            multiply_line<T>(slot, tiles, sum);
        else
            add_line_of_doubles(slot, tiles, sum);
    }
    wait_copies<0>();
}

// Each warp's sums to the warp `step` before it, which adds them to its own: join_lanes(), down to lanes 0 and 1.
PSE_DEVICE void join_warps(Shared<uint16_t> ring, int step, TileSums& sum PSE_CALLER) {
    const auto place = [&](int i, int j, int v, int e) {
        const int at = ((i * Super::kRights + j) * Super::kOwn + v) * 4 + e;
        return ((at * step + warp() % step) * kWarp + lane()) * 4;
    };
    const auto each = [&](const auto& f) {
        PSE_UNROLL
        for (int i = 0; i < Super::kLefts; ++i) PSE_UNROLL
        for (int j = 0; j < Super::kRights; ++j) PSE_UNROLL
        for (int v = 0; v < Super::kOwn; ++v) PSE_UNROLL
        for (int e = 0; e < 4; ++e) f(sum[i][j][v][e], place(i, j, v, e));
    };
    sync_block();
    if (warp() / step == 1) each([&](double& mine, int at) { to_ring(ring, at, mine); });
    sync_block();
    if (warp() / step == 0)
        each([&](double& mine, int at) { mine = add_rn(mine, from_ring<1, double>(ring, at).at[0]); });
}

PSE_KERNEL(Super::kThreads, kAnyOccupancy) gram_mma(Arrays a) {
    after_earlier_launches();
    PSE_SHARED(int64_t, addresses, Super::kStaged);
    PSE_COPIED_SHARED(uint16_t, ring, Super::kStages* Super::kStage);
    const int k = int(a.k);
    // Super tiles of one block of columns are neighbours in the grid, so that the L2 holds what they share.
    const int64_t supers = pairs_of(divide_up(k, Super::kSuper));
    const int64_t block_of_columns = block() / supers % a.blocks, group = block() / supers / a.blocks;
    const int super = int(block() % supers);
    const int super_left = int(row_of_pair(super));
    Tiles tiles = {super_left * Super::kSuper, (super - int(pairs_of(super_left))) * Super::kSuper, 0, 0};
    if (tiles.left != tiles.right) tiles.staged_left = Super::kSuper;
    PSE_UNROLL
    for (int t = 0; t < Super::kLefts * Super::kRights; ++t) {
        const int top = tiles.left + t / Super::kRights * 16, first = tiles.right + t % Super::kRights * 8;
        tiles.active |= uint32_t(top < k && first < k && first < top + 16) << t;
    }

    // Off the diagonal there are always kSuper right rows.
    const Piece piece = piece_of(a, block_of_columns);
    const int rows = tiles.staged_left + smaller(Super::kSuper, k - tiles.left);
    for (int r = thread(); r < rows; r += Super::kThreads) {
        const int row = r < tiles.staged_left ? tiles.right + r : tiles.left + r - tiles.staged_left;
        store(addresses, r, row_address(a, piece, group, row));
    }
    // Rows beyond k: their sums are of no use, but they are read.
    const int empty = (tiles.staged_left + Super::kSuper - rows) * Super::kRow;
    for (int e = thread(); e < empty * Super::kStages; e += Super::kThreads)
        store(ring, e / empty * Super::kStage + rows * Super::kRow + e % empty, uint16_t(0));
    sync_block();
    int64_t crooked = 0;
    for (int r = 0; r < rows; ++r) crooked |= load(addresses, r);
    const int width = crooked % 16 == 0 ? 16 : crooked % 4 == 0 ? 4 : 2;

    TileSums sum = {};
    switch (piece.dtype) {
        case DType::f32: add_piece<float>(piece, addresses, rows, width, ring, tiles, sum); break;
        case DType::f64: add_piece<double>(piece, addresses, rows, width, ring, tiles, sum); break;
        case DType::f16: add_piece<f16_t>(piece, addresses, rows, width, ring, tiles, sum); break;
        case DType::bf16: add_piece<bf16_t>(piece, addresses, rows, width, ring, tiles, sum); break;
    }
    join_warps(ring, 2, sum);
    join_warps(ring, 1, sum);
    if (warp() != 0) return;
    const int64_t partial = (group * a.blocks + block_of_columns) * a.pairs;
    PSE_UNROLL
    for (int i = 0; i < Super::kLefts; ++i) PSE_UNROLL
    for (int j = 0; j < Super::kRights; ++j) PSE_UNROLL
    for (int e = 0; e < 4; ++e) {
        const int row = tiles.left + 16 * i + lane() / 4 + e / 2 * 8;
        const int column = tiles.right + 8 * j + lane() % 4 * 2 + e % 2;
        if (row < k && column <= row)
            store(a.partials, partial + pair_index(row, column), add_rn(sum[i][j][0][e], sum[i][j][1][e]));
    }
}

}  // namespace cuda
}  // namespace pse
