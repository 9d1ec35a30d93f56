// Gram-space PCGrad on CUDA, step for step what csrc/cpu/projection.cpp does, and its bits.
// Bytes  reads 2kN elements, writes N, however many projections happen: k = 5 in fp32 is 44 N bytes.
// Floor  N = 2e7, k = 5, fp32: 880 MB, 207 us at 4.25 TB/s.
// Story  1 gram     partial sums of all pairs per block of kGramBlock columns, in fp64, in the order of
//                   core/gram_order.h. Up to kInline objectives a thread is one lane of one block and holds every
//                   pair in registers, or half of them; where blocks are few, tiles of pairs, so that more threads
//                   share a block. More objectives: tiles of 16 x 8 pairs by the tensor cores.
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

#include "cuda/projection_combine.cuh"
#include "cuda/projection_mma.cuh"
#include "cuda/projection_registers.cuh"
#include "cuda/projection_tiles.cuh"

namespace pse {
namespace cuda {

// Below this many blocks, 8 threads for each do not fill the card: a whole thread block takes each instead.
constexpr int64_t kFewBlocks = 512;

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
    return launch("gram_tiles", target, a.groups * a.blocks, Shape::kThreads, gram_tiles<Shape>, a);
}

static int launch_mma(const Arrays& a, const Target& target) {
    const int64_t supers = pairs_of(divide_up(a.k, Super::kSuper));
    return launch("gram_mma", target, a.groups * a.blocks * supers, Super::kThreads, gram_mma, a);
}

// Steps 1 to 3.
static int gram_and_recur(const Arrays& a, const Layout& layout, const ProjectionCall& call, const Target& target) {
    if (a.groups == 0) return 0;
    int error =
        fill_zero(target, reinterpret_cast<void*>(call.scratch + layout.tickets), 4 * a.groups * a.tickets_per_group);
    if (error != 0) return error;
    const bool few = call.path == GramPath::automatic ? a.groups * a.blocks < kFewBlocks : call.path == GramPath::tiles;
    if (a.k > kInline)
        error = launch_mma(a, target);
    else if (!few)
        error = launch_registers<int(kInline)>(a, target);
    else if (a.k <= FewColumns::kRows)
        error = launch_tiles<FewColumns>(a, target);
    else
        error = launch_tiles<MoreRows>(a, target);
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
