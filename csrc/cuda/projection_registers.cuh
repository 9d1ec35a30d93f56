// 1 of projection.cu for few objectives: all pairs in registers.
//
// A warp takes four blocks of columns, eight threads each: one per lane. Beyond kWarpRows two warps share the pairs.
// Rows come through a ring in shared memory, a line of each row and block of columns at a time: copies need no
// registers while they are in flight, and read whole sectors of 16-bit rows, of which eight lanes are half a one.
#pragma once
#include "cuda/projection_join.cuh"

namespace pse {
namespace cuda {

constexpr int kWarpRows = 12;  // 78 sums of a thread are 156 registers; two warps share the 136 of 16 rows

template <int rows>
struct Ring {
    static constexpr int kParts = rows > kWarpRows ? 2 : 1;
    static constexpr int kThreads = kParts * kWarp;
    static constexpr int kShare = kWarp / kLanes;  // blocks of columns
    // Rows of the first part: about half of the pairs.
    static constexpr int kFirst = kParts == 1 ? rows : (rows * 5 + 3) / 7;
    static constexpr int kPairsBefore = int(pairs_of(kFirst)), kPairs = int(pairs_of(rows));
    static constexpr int kSums = kPairsBefore > kPairs - kPairsBefore ? kPairsBefore : kPairs - kPairsBefore;
    static constexpr int kLine = rows <= 8 ? 128 : 64;  // bytes of one row and block: 8 rings fit a processor
    static constexpr int kPitch = kLine + 32;           // the four blocks of columns meet other banks
    static constexpr int kStages = 3;
    static constexpr int kRow = kShare * kPitch / 2;  // halfwords of a row in the ring
    static constexpr int kStage = rows * kRow;
    static constexpr int kCopies = kLine / 16;                      // per row and block of columns
    static constexpr int kAtOnce = kParts * kLanes / kCopies;       // rows that a block of columns' threads copy
    static constexpr int kRounds = (rows + kAtOnce - 1) / kAtOnce;  // copies of a thread per line
};

// The sums of the pairs of rows [kFrom, kTo) with all rows before, of one lane's elements in one column.
template <int kFrom, int kTo, class T, class Element>
PSE_DEVICE void add_column(const Element& element, double* sum) {
    constexpr bool kExact = sizeof(T) < 8;
    double x[kTo];
    PSE_UNROLL
    for (int i = 0; i < kTo; ++i) {
        x[i] = widened(element(i));
        if (i < kFrom) continue;
        PSE_UNROLL
        for (int j = 0; j <= i; ++j) {
            double& s = sum[i * (i + 1) / 2 + j - int(pairs_of(kFrom))];
            s = add_product<kExact>(s, x[i], x[j]);
        }
    }
}
template <int kRows, class T, class Element>
PSE_DEVICE void add_part(int part, const Element& element, double* sum) {
    constexpr int kFirst = Ring<kRows>::kFirst;
    if (part == 0)
        add_column<0, kFirst, T>(element, sum);
    else if constexpr (kFirst < kRows)
        add_column<kFirst, kRows, T>(element, sum);
}

// Whole lines. Returns the columns that are done.
template <int kRows, class T>
PSE_DEVICE int add_lines(const Arrays& a, const Piece& piece, int64_t group, int part, Shared<uint16_t> ring,
                         double* sum) {
    using R = Ring<kRows>;
    constexpr int kUnits = int(sizeof(T)) / 2, kSteps = R::kLine / (kLanes * int(sizeof(T)));
    const int lane_of_block = thread() % kLanes, share = thread() % kWarp / kLanes;
    const int lines = piece.count * int(sizeof(T)) / R::kLine;
    int most = lines;  // of the warp's four blocks of columns
    most = larger(most, shuffle_xor(most, kLanes));
    most = larger(most, shuffle_xor(most, 2 * kLanes));
    const int first_row = (part * kLanes + lane_of_block) / R::kCopies, sixteenth = lane_of_block % R::kCopies;
    const int to = first_row * R::kRow + share * R::kPitch / 2 + sixteenth * 8;
    Global<const uint16_t> from[R::kRounds];
    PSE_UNROLL
    for (int u = 0; u < R::kRounds; ++u) {
        const int row = smaller(first_row + u * R::kAtOnce, kRows - 1);
        from[u] =
            streamed<const uint16_t>(row_address(a, piece, group, row), int64_t(piece.count) * kUnits) + sixteenth * 8;
    }
    const auto copy_line = [&](int line, int slot) {
        if (line < lines) {
            const Shared<uint16_t> target = ring + (slot + to);
            PSE_UNROLL
            for (int u = 0; u < R::kRounds; ++u)
                if ((u + 1) * R::kAtOnce <= kRows || first_row + u * R::kAtOnce < kRows)
                    copy_async<8>(target, u * R::kAtOnce * R::kRow, from[u], line * R::kLine / 2);
        }
        commit_copies();
    };
    int filled = 0, read = 0;  // slots of the ring
    const auto after = [](int slot) { return slot < (R::kStages - 1) * R::kStage ? slot + R::kStage : 0; };
    for (int line = 0; line < R::kStages - 1; ++line, filled = after(filled)) copy_line(line, filled);
    for (int line = 0; line < most; ++line, filled = after(filled), read = after(read)) {
        wait_copies<R::kStages - 2>();
        sync_block();  // the line is there, and the one before has been read
        copy_line(line + R::kStages - 1, filled);
        if (line >= lines) continue;
        for (int step = 0; step < kSteps; ++step) {
            const int at = read + share * R::kPitch / 2 + (step * kLanes + lane_of_block) * kUnits;
            add_part<kRows, T>(part, [&](int i) { return from_ring<1, T>(ring, at + i * R::kRow).at[0]; }, sum);
        }
    }
    wait_copies<0>();
    return lines * R::kLine / int(sizeof(T));
}

// What lines leave, column by column: ends of blocks, and all of it where lines cannot be copied.
template <int kRows, class T>
PSE_DEVICE void add_columns(const Arrays& a, const Piece& piece, int64_t group, int part, int first, double* sum) {
    // Loads in flight per thread, within the registers that the sums leave.
    constexpr int kSteps = kRows <= 3 ? 8 : kRows <= 5 ? 4 : kRows <= 8 ? 2 : 1;
    if (first >= piece.count) return;  // before the rows' addresses, which a table holds
    const int lane_of_block = thread() % kLanes;
    Global<const T> rows[kRows];
    PSE_UNROLL
    for (int i = 0; i < kRows; ++i) rows[i] = streamed<const T>(row_address(a, piece, group, i), piece.count);
    int column = first + lane_of_block;
    for (; column + (kSteps - 1) * kLanes < piece.count; column += kSteps * kLanes) {
        T raw[kSteps][kRows];
        PSE_UNROLL
        for (int s = 0; s < kSteps; ++s) PSE_UNROLL
        for (int i = 0; i < kRows; ++i) raw[s][i] = load(rows[i], column + s * kLanes);
        PSE_UNROLL
        for (int s = 0; s < kSteps; ++s) add_part<kRows, T>(part, [&](int i) { return raw[s][i]; }, sum);
    }
    for (; column < piece.count; column += kLanes)
        add_part<kRows, T>(part, [&](int i) { return T(load(rows[i], column)); }, sum);
}

template <int kRows, class T>
PSE_DEVICE void add_rows(const Arrays& a, const Piece& piece, int64_t group, int part, bool straight,
                         Shared<uint16_t> ring, double* sum) {
    const int done = straight ? add_lines<kRows, T>(a, piece, group, part, ring, sum) : 0;
    add_columns<kRows, T>(a, piece, group, part, done, sum);
}

template <int kRows>
PSE_KERNEL(Ring<kRows>::kThreads, kAnyOccupancy)
gram_registers(Arrays a) {
    after_earlier_launches();
    using R = Ring<kRows>;
    PSE_COPIED_SHARED(uint16_t, ring, R::kStages* R::kStage);
    const int64_t shares = divide_up(a.blocks, R::kShare), group = block() / shares, share = block() % shares;
    const int64_t block_of_columns = share * R::kShare + lane() / kLanes;
    const int lane_of_block = thread() % kLanes, part = warp();
    double sum[R::kSums];
    PSE_UNROLL
    for (int p = 0; p < R::kSums; ++p) sum[p] = 0.0;
    const bool exists = block_of_columns < a.blocks;
    Piece piece = {0, 0, 0, 0, a.dtype};
    int64_t crooked = 0;
    if (exists) {
        piece = piece_of(a, block_of_columns);
        for (int i = 0; i < kRows; ++i) crooked |= row_address(a, piece, group, i);
    }
    // Lines are copied by the warp together: its blocks of columns must agree.
    const int dtype = shuffle(int(piece.dtype), 0);
    const bool agreed = !exists || (crooked % 16 == 0 && int(piece.dtype) == dtype);
    const bool straight = ballot(agreed) == kAllLanes;
    switch (exists ? piece.dtype : DType(dtype)) {
        case DType::f32: add_rows<kRows, float>(a, piece, group, part, straight, ring, sum); break;
        case DType::f64: add_rows<kRows, double>(a, piece, group, part, straight, ring, sum); break;
        case DType::f16: add_rows<kRows, f16_t>(a, piece, group, part, straight, ring, sum); break;
        case DType::bf16: add_rows<kRows, bf16_t>(a, piece, group, part, straight, ring, sum); break;
    }
    const int64_t partial = (group * a.blocks + block_of_columns) * R::kPairs;
    PSE_UNROLL
    for (int p = 0; p < R::kSums; ++p) {
        const double joined = join_lanes_of_threads(sum[p]);
        const int pair = part * R::kPairsBefore + p, end = part == 0 ? R::kPairsBefore : R::kPairs;
        if (exists && pair < end && lane_of_block == p % kLanes) store(a.partials, partial + pair, joined);
    }
    const int64_t run = share * R::kShare / kGramRun;
    join_inline(a, group, run, smaller(kGramRun / R::kShare, shares - run * (kGramRun / R::kShare)));
}

}  // namespace cuda
}  // namespace pse
