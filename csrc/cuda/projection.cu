// Gram-space PCGrad on CUDA, step for step what csrc/cpu/projection.cpp does, and its bits.
// Bytes  reads 2kN elements, writes N, however many projections happen: k = 5 in fp32 is 44 N bytes.
// Floor  N = 2e7, k = 5, fp32: 880 MB, 207 us at 4.25 TB/s.
// Story  1 gram     partial sums of all pairs per block of kGramBlock columns, in fp64, in the order of
//                   core/gram_order.h. Few objectives: a thread is one lane of one block and holds every pair in
//                   registers, or half of them; rows come by asynchronous copies. Many, or few blocks: rows staged
//                   in shared memory as fp64, kTile x kTile pairs a thread.
//        2 join     the last block of a run adds its blocks up, the last run of the group its runs.
//        3 recur    k-vectors in fp64 (core/pcgrad.h): coefficients of the projections, then of their sum.
//        4 combine  out = sum_j c_j g_j in fp64, j ascending, unfused, rounded once; last columns first, which the
//                   Gram pass has left in the L2.
//        Up to kInline objectives 1 to 3 are one launch, joined by last_block(); beyond, joining k^2 / 2 sums and k^2
//        steps of the recurrence would be too long for one block, and 2 and 3 are launches of their own.
// Order  is fixed by N and k alone, never by the grid: no atomics on floats, the same bits on every device.
// Bad    a squared norm that takes part and is not finite, or a weight that is not finite and >= 0: the group's flag is
//        false and its output NaN. Nothing is read back.
#include "cuda/projection.h"

#include "core/gram_order.h"
#include "cuda/simt.cuh"

namespace pse {
namespace cuda {

using namespace simt;
using namespace PSE_ISA;

constexpr int kLanes = int(kGramLanes);
constexpr int kWarpRows = 12;          // 78 sums of a thread are 156 registers
constexpr int64_t kRegisterRows = 16;  // two warps share 136 sums
// Below this many blocks, 8 threads for each do not fill the card: a whole thread block takes each instead.
constexpr int64_t kFewBlocks = 512;
constexpr int64_t kInline = 16;   // objectives whose join and recurrence one block does in passing: 136 pairs
constexpr int kAnyOccupancy = 1;  // blocks per processor to compile for: left to itself, ptxas spills to fit one more
constexpr int kJoinThreads = 256;
constexpr int kRecurThreads = 128;
constexpr int kCombineThreads = 256;

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

// ---- 3. recur

template <class Order>
PSE_DEVICE void fill_order(const Arrays& a, int64_t group, int objective, Order order) {
    const int others = int(a.k) - 1;
    if (a.mode == ProjectionOrder::random) return draw_order(a.seed, uint64_t(group), objective, a.k, order);
    for (int n = 0; n < others; ++n)
        order[n] = a.mode == ProjectionOrder::given ? int32_t(load(a.order, int64_t(objective) * others + n))
                                                    : (n < objective ? n : n + 1);
}

// A factor of exactly 1 changes no bit: without weights the sums are those of the core's null pointer.
PSE_DEVICE double weight_of(const Arrays& a, int64_t group, int objective) {
    return a.weights != nullptr ? load(a.weights, group * a.k + objective) : 1.0;
}

// Coefficients of the result, of the objectives that take part and packed, and the group's flag. By the whole block.
template <class Projected>
PSE_DEVICE void combine_projected(const Arrays& a, int64_t group, Shared<double> weights, Shared<double> squared_norms,
                                  Projected projected) {
    const int k = int(a.k);
    for (int m = thread(); m < k; m += threads()) {
        int place = 0, count = 0;
        bool finite = true;
        for (int i = 0; i < k; ++i) {
            const double weight = load(weights, i), norm = load(squared_norms, i);
            const bool part = weight != 0.0;
            place += part && i < m;
            count += part;
            finite = finite && (!part || (weight - weight == 0.0 && weight > 0.0 && norm - norm == 0.0));
        }
        if (m == 0) {
            store(a.finite, group, uint8_t(finite));
            store(a.active_count, group, int32_t(count));
        }
        if (load(weights, m) == 0.0) continue;
        store(a.active, group * k + place, int32_t(m));
        store(a.coefficients, group * k + place,
              combined_coefficient(projected, elements(weights), m, int64_t(k), a.mean));
    }
}

// Few objectives: a thread each, in the block that has joined the Gram matrix.
PSE_DEVICE void recur_inline(const Arrays& a, int64_t group) {
    PSE_SHARED(double, gram, kInline* kInline);
    PSE_SHARED(double, projected, kInline* kInline);
    PSE_SHARED(double, weights, kInline);
    PSE_SHARED(double, squared_norms, kInline);
    PSE_SHARED(int32_t, order, kInline* kInline);
    const int k = int(a.k);
    for (int e = thread(); e < k * k; e += threads()) {
        const double dot = load(a.gram, group * k * k + e);
        store(gram, e, dot);
        if (e % (k + 1) == 0) store(squared_norms, e / (k + 1), dot);
    }
    for (int i = thread(); i < k; i += threads()) store(weights, i, weight_of(a, group, i));
    sync_block();
    for (int i = thread(); i < k; i += threads()) {
        fill_order(a, group, i, elements(order + i * k));
        project_objective(elements(gram), elements(weights), elements(order + i * k), i, int64_t(k),
                          elements(projected + i * k));
    }
    sync_block();
    for (int e = thread(); e < k * k; e += threads()) store(a.projected, group * k * k + e, load(projected, e));
    combine_projected(a, group, weights, squared_norms, elements(projected));
}

// Many: a block each. Its threads fetch a row of the Gram matrix per step, the next one while thread 0 adds: the dot is
// one chain by definition.
PSE_KERNEL(kRecurThreads) recur_objective(Arrays a) {
    after_earlier_launches();
    PSE_SHARED(double, weights, kMostObjectives);
    PSE_SHARED(double, squared_norms, kMostObjectives);
    PSE_SHARED(double, row, kMostObjectives);
    PSE_SHARED(double, coefficients, kMostObjectives);
    PSE_SHARED(int32_t, order, kMostObjectives);
    const int k = int(a.k);
    const int64_t group = block() / k;
    const int objective = int(block() % k);
    const Global<double> gram = a.gram + group * k * k;
    for (int m = thread(); m < k; m += kRecurThreads) {
        store(weights, m, weight_of(a, group, m));
        store(squared_norms, m, load(gram, int64_t(m) * k + m));
        store(coefficients, m, m == objective ? 1.0 : 0.0);
    }
    if (thread() == 0) fill_order(a, group, objective, elements(order));
    sync_block();
    double fetched[kMostObjectives / kRecurThreads] = {};
    const auto fetch_row = [&](int step) {
        PSE_UNROLL
        for (int u = 0; u < kMostObjectives / kRecurThreads; ++u) {
            const int m = thread() + u * kRecurThreads;
            if (step < k - 1 && m < k) fetched[u] = load(gram, int64_t(load(order, step)) * k + m);
        }
    };
    fetch_row(0);
    for (int step = 0; step < k - 1 && load(weights, objective) != 0.0; ++step) {
        PSE_UNROLL
        for (int u = 0; u < kMostObjectives / kRecurThreads; ++u)
            if (thread() + u * kRecurThreads < k) store(row, thread() + u * kRecurThreads, fetched[u]);
        sync_block();
        fetch_row(step + 1);
        const int j = load(order, step);
        if (thread() == 0 && load(weights, j) != 0.0 && load(squared_norms, j) > 0.0) {
            const double dot = dot_of(elements(coefficients), elements(row), int64_t(k));
            store(coefficients, j, without_conflict(load(coefficients, j), dot, load(squared_norms, j)));
        }
        sync_block();
    }
    for (int m = thread(); m < k; m += kRecurThreads)
        store(a.projected, (group * k + objective) * k + m, load(coefficients, m));
    if (!last_block(a.tickets, (group + 1) * a.tickets_per_group - 1, uint32_t(k))) return;
    combine_projected(a, group, weights, squared_norms, elements(a.projected + group * k * k));
}

// ---- 2. join

// A column of sums, in order from 0. As many loads as half a run has blocks wait for memory once, the last ones too.
PSE_DEVICE double sum_in_order(Global<const double> sums, int64_t count, int stride) {
    constexpr int kAtOnce = int(kGramRun) / 2;
    double sum = 0.0;
    for (int64_t i = 0; i < count; i += kAtOnce) {
        const int here = int(smaller(int64_t(kAtOnce), count - i));
        const Global<const double> from = sums + i * stride;
        double part[kAtOnce];
        PSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) part[u] = u < here ? load(from, u * stride) : 0.0;
        PSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u)
            if (u < here) sum = add_rn(sum, part[u]);
    }
    return sum;
}

PSE_DEVICE void join_run(const Arrays& a, int64_t group, int64_t run, int64_t pair) {
    const int64_t first = run * kGramRun, count = smaller(kGramRun, a.blocks - first);
    store(a.run_sums, (group * a.runs + run) * a.pairs + pair,
          sum_in_order(a.partials + ((group * a.blocks + first) * a.pairs + pair), count, int(a.pairs)));
}

PSE_DEVICE void join_runs(const Arrays& a, int64_t group, int64_t pair) {
    int64_t i = 0;
    while (pairs_of(i + 1) <= pair) ++i;
    const int64_t j = pair - pairs_of(i);
    const double sum = sum_in_order(a.run_sums + (group * a.runs * a.pairs + pair), a.runs, int(a.pairs));
    store(a.gram, (group * a.k + i) * a.k + j, sum);
    store(a.gram, (group * a.k + j) * a.k + i, sum);
}

// The end of a thread block that has added its share of a run: `shares` of them make the run.
PSE_DEVICE void join_inline(const Arrays& a, int64_t group, int64_t run, int64_t shares) {
    if (!last_block(a.tickets, group * a.tickets_per_group + run, uint32_t(shares))) return;
    for (int64_t pair = thread(); pair < a.pairs; pair += threads()) join_run(a, group, run, pair);
    if (a.runs > 1 && !last_block(a.tickets, (group + 1) * a.tickets_per_group - 1, uint32_t(a.runs))) return;
    for (int64_t pair = thread(); pair < a.pairs; pair += threads()) join_runs(a, group, pair);
    if (!a.project) return;
    sync_block();
    recur_inline(a, group);
}

PSE_KERNEL(kJoinThreads) join_pairs(Arrays a) {
    after_earlier_launches();
    const int64_t chunks = divide_up(a.pairs, kJoinThreads), chunk = block() % chunks;
    const int64_t run = block() / chunks % a.runs, group = block() / chunks / a.runs;
    const int64_t pair = chunk * kJoinThreads + thread();
    if (pair < a.pairs) join_run(a, group, run, pair);
    if (!last_block(a.tickets, group * a.tickets_per_group + chunk, uint32_t(a.runs))) return;
    if (pair < a.pairs) join_runs(a, group, pair);
}

// ---- 1. gram, all pairs in registers

// A warp takes four blocks of columns, eight threads each: one per lane. Beyond kWarpRows two warps share the pairs.
// Rows come through a ring in shared memory, a line of each row and block of columns at a time: copies need no
// registers while they are in flight, and read whole sectors of 16-bit rows, of which eight lanes are half a one.
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
            global<const uint16_t>(row_address(a, piece, group, row), int64_t(piece.count) * kUnits) + sixteenth * 8;
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
            add_part<kRows, T>(
                part,
                [&](int i) {
                    T x;
                    const auto units = load_vector<kUnits>(ring, at + i * R::kRow);
                    __builtin_memcpy(&x, &units, sizeof x);
                    return x;
                },
                sum);
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
    for (int i = 0; i < kRows; ++i) rows[i] = global<const T>(row_address(a, piece, group, i), piece.count);
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

// join_lanes() for 8 neighbouring threads, a lane each: every one of them gets the result.
PSE_DEVICE double join_lanes_of_threads(double x) {
    x = add_rn(x, shuffle_xor(x, 4));
    x = add_rn(x, shuffle_xor(x, 2));
    return add_rn(x, shuffle_xor(x, 1));
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

// ---- 1. gram, tiles of pairs over rows staged in shared memory

// kThreads threads take kSuper rows against kSuper rows of one block of columns, kColumns at a time.
template <int tile, int super, int columns, int threads>
struct TileShape {
    static constexpr int kTile = tile;  // kTile^2 sums in registers for 2 kTile loads from shared memory
    static constexpr int kSuper = super;
    static constexpr int kColumns = columns;
    static constexpr int kThreads = threads;
    static constexpr int kSide = super / tile;
    static constexpr bool kOneSuper = super <= kInline;  // all rows at once, and the join in the same launch
    static constexpr int kStaged = kOneSuper ? super : 2 * super;
    // Rows of 8 lanes, one row free behind each tile, an odd number in all: tiles, and steps, then meet in other banks.
    static constexpr int kStride = (kStaged + kStaged / tile) | 1;
    static constexpr int kSlab = columns / kLanes * kStride * kLanes;
    static constexpr int kFetched = kStaged * columns / threads;  // values per thread and slab
    static_assert(columns % threads == 0 || threads % columns == 0, "a warp fetches from one row");
    static_assert(kStaged * columns % threads == 0, "every thread fetches as many");
    static_assert((kOneSuper ? kSide * (kSide + 1) / 2 : kSide * kSide) * kLanes <= threads,
                  "a thread per tile and lane");
    static_assert(kSlab * 8 <= 42 << 10, "static shared memory, beside the recurrence's");
};
// Slabs as long as memory takes to answer: a slab's sums are a chain of columns / 8 steps of 8 to 16 cycles.
using FewColumns = TileShape<2, 6, 512, 256>;  // 4 sums a thread
using MoreRows = TileShape<4, 16, 256, 256>;   // 16 sums: half the loads from shared memory per product
using ManyRows = TileShape<8, 32, 32, 128>;    // k^2 / 2048 super tiles, each of which reads its rows again (L2)

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
    static constexpr int kRowsAtOnce = Shape::kThreads > Shape::kColumns ? Shape::kThreads / Shape::kColumns : 1;
    static constexpr int kOfRow = Shape::kThreads < Shape::kColumns ? Shape::kColumns / Shape::kThreads : 1;
    static_assert(Shape::kTile % kRowsAtOnce == 0, "a tile begins with one of a thread's elements, or between them");
    // How many elements of this thread are of the first `rows` rows.
    PSE_METHOD static int count(int rows) {
        return (rows - thread() / Shape::kColumns + kRowsAtOnce - 1) / kRowsAtOnce * kOfRow;
    }
    PSE_METHOD static int row(int u) { return u * Shape::kThreads / Shape::kColumns + thread() / Shape::kColumns; }
    PSE_METHOD static int column(int u) { return u * Shape::kThreads % Shape::kColumns + thread() % Shape::kColumns; }
    PSE_METHOD static int index(int u) {
        const int first = slab_index<Shape>(0, thread() % Shape::kColumns) + thread() / Shape::kColumns * kLanes;
        return first + slab_index<Shape>(u * Shape::kThreads / Shape::kColumns, u * Shape::kThreads % Shape::kColumns);
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
            raw[u] = load(global<const T>(load(addresses, Fetched<Shape>::row(u)), count), column);
    }
}

template <class Shape, class T>
PSE_DEVICE void add_tiles(const Piece& piece, Shared<int64_t> addresses, int rows, Shared<double> slab,
                          const Tile& tile, double* sum) {
    constexpr bool kExact = sizeof(T) < 8;
    constexpr int kTile = Shape::kTile;
    constexpr bool kAhead = sizeof(T) < 8 || kTile < 4;  // the next values would spill beside so many sums
    const int mine = Fetched<Shape>::count(rows);
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
    constexpr int kTile = Shape::kTile, kSide = Shape::kSide;
    PSE_SHARED(int64_t, addresses, Shape::kStaged);
    PSE_SHARED(double, slab, Shape::kSlab);
    const int k = int(a.k);
    // Super tiles of one block of columns are neighbours in the grid, so that the L2 holds what they share.
    const int64_t super_rows = divide_up(k, Shape::kSuper), supers = pairs_of(super_rows);
    const int64_t block_of_columns = block() / supers % a.blocks, group = block() / supers / a.blocks;
    const int super = int(block() % supers);
    int super_left = 0;
    while (pairs_of(super_left + 1) <= super) ++super_left;
    const int super_right = super - int(pairs_of(super_left));
    const bool diagonal = super_left == super_right;

    // Off the diagonal the right rows come first: there are always kSuper of them.
    const Piece piece = piece_of(a, block_of_columns);
    const int first_left = diagonal ? 0 : Shape::kSuper;
    const int rows = first_left + smaller(Shape::kSuper, k - super_left * Shape::kSuper);
    for (int r = thread(); r < rows; r += Shape::kThreads) {
        const int row = r < first_left ? super_right * Shape::kSuper + r : super_left * Shape::kSuper + r - first_left;
        store(addresses, r, row_address(a, piece, group, row));
    }
    // The last tile's rows beyond k: their sums are of no use, but they are read.
    const int padding = (kTile - rows % kTile) % kTile;
    for (int e = thread(); e < padding * Shape::kColumns; e += Shape::kThreads)
        store(slab, slab_index<Shape>(rows + e / Shape::kColumns, e % Shape::kColumns), 0.0);
    const int t = thread() / kLanes;
    int tile_left = t / kSide, tile_right = t % kSide;
    bool active = t < kSide * kSide;
    if (diagonal) {
        tile_left = 0;
        while (pairs_of(tile_left + 1) <= t) ++tile_left;
        tile_right = t - int(pairs_of(tile_left));
        active = tile_left < kSide;
    }
    const int left = super_left * Shape::kSuper + tile_left * kTile;
    const int right = super_right * Shape::kSuper + tile_right * kTile;
    const Tile tile = {slab_index<Shape>(first_left + tile_left * kTile, 0), slab_index<Shape>(tile_right * kTile, 0),
                       active && left < k && right < k};

    double sum[kTile * kTile];
    PSE_UNROLL
    for (int p = 0; p < kTile * kTile; ++p) sum[p] = 0.0;
    sync_block();
    switch (piece.dtype) {
        case DType::f32: add_tiles<Shape, float>(piece, addresses, rows, slab, tile, sum); break;
        case DType::f64: add_tiles<Shape, double>(piece, addresses, rows, slab, tile, sum); break;
        case DType::f16: add_tiles<Shape, f16_t>(piece, addresses, rows, slab, tile, sum); break;
        case DType::bf16: add_tiles<Shape, bf16_t>(piece, addresses, rows, slab, tile, sum); break;
    }
    const int64_t partial = (group * a.blocks + block_of_columns) * a.pairs;
    PSE_UNROLL
    for (int p = 0; p < kTile * kTile; ++p) {
        const double joined = join_lanes_of_threads(sum[p]);
        const int i = left + p / kTile, j = right + p % kTile;
        if (tile.active && thread() % kLanes == p % kLanes && i < k && j <= i)
            store(a.partials, partial + pair_index(i, j), joined);
    }
    if constexpr (Shape::kOneSuper) {
        const int64_t run = block_of_columns / kGramRun;
        join_inline(a, group, run, smaller(kGramRun, a.blocks - run * kGramRun));
    }
}

// ---- 4. combine

// Columns [first + thread() * kWidth, end) in strides of the block, kWidth neighbours a thread.
template <class T, int kWidth>
PSE_DEVICE void combine_columns(const Piece& piece, Shared<int64_t> addresses, Shared<double> coefficients, int active,
                                double start, Global<T> out, int first, int end) {
    constexpr int kRows = 4;  // rows in flight
    for (int column = first + thread() * kWidth; column < end; column += kCombineThreads * kWidth) {
        double sum[kWidth];
        PSE_UNROLL
        for (int v = 0; v < kWidth; ++v) sum[v] = start;
        for (int j = 0; j < active; j += kRows) {
            Vector<T, kWidth> raw[kRows] = {};
            PSE_UNROLL
            for (int u = 0; u < kRows; ++u)
                if (j + u < active)
                    raw[u] = load_vector<kWidth>(global<const T>(load(addresses, j + u), piece.count), column);
            PSE_UNROLL
            for (int u = 0; u < kRows; ++u) {
                if (j + u >= active) continue;
                const double coefficient = load(coefficients, j + u);
                PSE_UNROLL
                for (int v = 0; v < kWidth; ++v) sum[v] = add_rn(sum[v], mul_rn(coefficient, widened(raw[u].at[v])));
            }
        }
        Vector<T, kWidth> rounded = {};
        PSE_UNROLL
        for (int v = 0; v < kWidth; ++v) round_to(sum[v], rounded.at[v]);
        store_vector<kWidth>(out, column, rounded);
    }
}

template <class T>
PSE_DEVICE void combine_piece(const Piece& piece, Shared<int64_t> addresses, Shared<double> coefficients, int active,
                              double start, int64_t to) {
    constexpr int kWidth = 16 / int(sizeof(T));
    int64_t crooked = to;
    for (int j = 0; j < active; ++j) crooked |= load(addresses, j);
    const int whole = crooked % 16 == 0 ? piece.count / kWidth * kWidth : 0;
    const Global<T> out = global<T>(to, piece.count);
    combine_columns<T, kWidth>(piece, addresses, coefficients, active, start, out, 0, whole);
    combine_columns<T, 1>(piece, addresses, coefficients, active, start, out, whole, piece.count);
}

PSE_KERNEL(kCombineThreads, kAnyOccupancy) combine(Arrays a) {
    after_earlier_launches();
    PSE_SHARED(int64_t, addresses, kMostObjectives);
    PSE_SHARED(double, coefficients, kMostObjectives);
    const int64_t reversed = blocks() - 1 - block();
    const int64_t group = reversed / a.blocks;
    const Piece piece = piece_of(a, reversed % a.blocks);
    const bool finite = load(a.finite, group) != 0;
    const int active = finite ? load(a.active_count, group) : 0;
    for (int j = thread(); j < active; j += kCombineThreads) {
        store(addresses, j, row_address(a, piece, group, load(a.active, group * a.k + j)));
        store(coefficients, j, load(a.coefficients, group * a.k + j));
    }
    sync_block();
    // -0 + x is x: a lone -0 keeps its sign.
    const double start = !finite ? bits_double(0x7ff8000000000000ull) : active > 0 ? -0.0 : 0.0;
    const int64_t to = out_address(a, piece, group);
    switch (piece.dtype) {
        case DType::f32: return combine_piece<float>(piece, addresses, coefficients, active, start, to);
        case DType::f64: return combine_piece<double>(piece, addresses, coefficients, active, start, to);
        case DType::f16: return combine_piece<f16_t>(piece, addresses, coefficients, active, start, to);
        case DType::bf16: return combine_piece<bf16_t>(piece, addresses, coefficients, active, start, to);
    }
}

// ---- small tables by kernel argument

constexpr int kWords = 448;  // 3.5 of the 4 KB that every driver takes

struct Words {
    int64_t at[kWords];
};

PSE_KERNEL(kWords) write_argument(Words words, Global<int64_t> to, int count) {
    after_earlier_launches();
    if (thread() < count) store(to, thread(), words.at[thread()]);
}

int write_words(const int64_t* words, int64_t count, int64_t to, int device, void* stream) {
    const Target target = {device, stream};
    for (int64_t start = 0; start < count; start += kWords) {
        const int now = int(count - start < kWords ? count - start : kWords);
        Words chunk = {};
        for (int i = 0; i < now; ++i) chunk.at[i] = words[start + i];
        const Global<int64_t> there = global<int64_t>(to + start * 8, now);
        if (const int error = launch("write_argument", target, 1, kWords, write_argument, chunk, there, now))
            return error;
    }
    return 0;
}

// ---- scratch, and the launches

struct Layout {
    int64_t blocks, runs, pairs, tickets_per_group;
    int64_t run_sums, coefficients, tickets, active, active_count, bytes;  // offsets; partials come first
};

static Layout layout_of(int64_t groups, int64_t k, int64_t blocks) {
    Layout l = {};
    l.blocks = blocks > 1 ? blocks : 1;  // without elements: one block without columns
    l.runs = divide_up(l.blocks, kGramRun);
    l.pairs = pairs_of(k);
    l.tickets_per_group = 1 + (k <= kInline ? l.runs : divide_up(l.pairs, kJoinThreads));
    l.run_sums = 8 * groups * l.blocks * l.pairs;
    l.coefficients = l.run_sums + 8 * groups * l.runs * l.pairs;
    l.tickets = l.coefficients + 8 * groups * k;
    l.active = l.tickets + 4 * groups * l.tickets_per_group;
    l.active_count = l.active + 4 * groups * k;
    l.bytes = divide_up(l.active_count + 4 * groups, 16) * 16;
    return l;
}

int64_t projection_scratch_bytes(int64_t groups, int64_t k, int64_t blocks) {
    return layout_of(groups, k, blocks).bytes;
}

static Arrays arrays_of(const ProjectionCall& c, const Layout& l, bool project) {
    const int64_t gk = c.groups * c.k;
    Arrays a = {};
    a.dense = c.grads;
    a.table = global<const int64_t>(c.table, (c.k + 4) * c.tensors + 1);
    a.tensors = c.tensors;
    a.groups = c.groups;
    a.k = c.k;
    a.n = c.n;
    a.blocks = l.blocks;
    a.runs = l.runs;
    a.pairs = l.pairs;
    a.tickets_per_group = l.tickets_per_group;
    a.dtype = c.dtype;
    a.partials = global<double>(c.scratch, c.groups * l.blocks * l.pairs);
    a.run_sums = global<double>(c.scratch + l.run_sums, c.groups * l.runs * l.pairs);
    a.tickets = global<uint32_t>(c.scratch + l.tickets, c.groups * l.tickets_per_group);
    a.gram = global<double>(c.gram, gk * c.k);
    a.project = project;
    if (!project) return a;
    a.weights = global<const double>(c.weights, gk);
    a.order = global<const uint16_t>(c.order, c.k * (c.k - 1));
    a.seed = c.seed;
    a.mode = c.mode;
    a.mean = c.mean;
    a.projected = global<double>(c.projected, gk * c.k);
    a.finite = global<uint8_t>(c.finite, c.groups);
    a.coefficients = global<double>(c.scratch + l.coefficients, gk);
    a.active = global<int32_t>(c.scratch + l.active, gk);
    a.active_count = global<int32_t>(c.scratch + l.active_count, c.groups);
    a.out = c.out;
    return a;
}

template <int kRows>
static int launch_registers(const Arrays& a, const Target& target) {
    if constexpr (kRows > 0) {
        if (a.k != kRows) return launch_registers<kRows - 1>(a, target);
        const int64_t shares = divide_up(a.blocks, Ring<kRows>::kShare);
        return launch("gram_registers", target, a.groups * shares, Ring<kRows>::kThreads, gram_registers<kRows>, a);
    }
    return 0;
}

template <class Shape>
static int launch_tiles(const Arrays& a, const Target& target) {
    const int64_t supers = pairs_of(divide_up(a.k, Shape::kSuper));
    return launch("gram_tiles", target, a.groups * a.blocks * supers, Shape::kThreads, gram_tiles<Shape>, a);
}

// Steps 1 to 3.
static int gram_and_recur(const Arrays& a, const Layout& layout, const ProjectionCall& call, const Target& target) {
    if (a.groups == 0) return 0;
    int error =
        fill_zero(target, reinterpret_cast<void*>(call.scratch + layout.tickets), 4 * a.groups * a.tickets_per_group);
    if (error != 0) return error;
    const bool few = call.path == GramPath::automatic ? a.groups * a.blocks < kFewBlocks : call.path == GramPath::tiles;
    if (a.k <= kRegisterRows && !few)
        error = launch_registers<kRegisterRows>(a, target);
    else if (a.k <= FewColumns::kSuper)
        error = launch_tiles<FewColumns>(a, target);
    else if (a.k <= MoreRows::kSuper)
        error = launch_tiles<MoreRows>(a, target);
    else
        error = launch_tiles<ManyRows>(a, target);
    if (error != 0 || a.k <= kInline) return error;
    const int64_t chunks = divide_up(a.pairs, kJoinThreads);
    error = launch("join_pairs", target, a.groups * a.runs * chunks, kJoinThreads, join_pairs, a);
    if (error != 0 || !a.project) return error;
    return launch("recur_objective", target, a.groups * a.k, kRecurThreads, recur_objective, a);
}

int gram(const ProjectionCall& call, int device, void* stream) {
    const Layout layout = layout_of(call.groups, call.k, call.blocks);
    return gram_and_recur(arrays_of(call, layout, false), layout, call, {device, stream});
}

int project(const ProjectionCall& call, int device, void* stream) {
    const Target target = {device, stream};
    const Layout layout = layout_of(call.groups, call.k, call.blocks);
    const Arrays a = arrays_of(call, layout, true);
    if (const int error = gram_and_recur(a, layout, call, target)) return error;
    return launch("combine", target, a.groups * a.blocks, kCombineThreads, combine, a);
}

}  // namespace cuda
}  // namespace pse
