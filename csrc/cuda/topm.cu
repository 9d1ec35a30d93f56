// Subtract scale * (tuned - base) from params at the m entries of largest score, or list them.
//
// Bytes  one_pass: base, tuned, and the touched 32-byte sectors of params, loaded and stored: 7.2 B per bf16 element at
//        density 0.10, 4.6 at 0.01; a record is 1.9 and 0.5 more. Else base + tuned once more: the look does not edit.
// Floor  a dense pass over base, tuned and params is 8 B per bf16 element; in place, 6 B, and the edit 1.6 B less.
// Order  (key descending, flat index ascending): no ties, so one result for every grid, chunk size and schedule, which
//        is that of csrc/cpu/topm.cpp.
// Story  1 sample positions -> two places A and B in the order that bracket the m-th entry (topm_sample, topm_rank)
//        2 sweep: count what A holds (one_pass: edit it), collect what B holds beyond A: the candidates
//        3 settle the candidates: the exact place K of the m-th entry (topm_settle, topm_rank)
//        4 edit (or list) what K holds (topm_apply); with one_pass only the chosen candidates are left (topm_pool), and
//        for a record what the sweep has noted is put in order with them (topm_journal)
// Unlucky  Too many candidates, or too few: the exact select (topm_exact), 11 bits of the key a launch, over what A
//        does not hold (one_pass) or over all. It has the launches of 3: every group goes the way that is left to it,
//        and the host never learns which, so the whole can be captured in a graph. More than m above A after one_pass
//        has edited: below 1e-30; nonfinite = -1 says that params are spoilt.
// Groups of up to 2^16 entries are not sampled: the exact select reads them from the L2 cache.
// Launches  open, sample, bracket, sweep, four of settle, apply: 9; one more beyond 2^16 samples, another beyond 2^20,
//        and one for the order of a record or a list. Without a sample: open, four of settle, apply; one of settle
//        where no group has more than a chunk.
// Passes give each block one run of chunks, so that counters stay in registers until the tensor changes.
#include "cuda/topm.h"

#include <vector>

#include "cuda/topm_apply.cuh"
#include "cuda/topm_exact.cuh"
#include "cuda/topm_sample.cuh"
#include "cuda/topm_settle.cuh"
#include "cuda/topm_sweep.cuh"

namespace pse {
namespace cuda {

constexpr int64_t kUnsampled = 1 << 16;  // groups up to here are selected exactly at once
constexpr int64_t kAlone = 1 << 16;      // of so many samples, a part of the first digit is left to one block

// s = N^(2/3), as a power of two; and the ranks between the expected place of the m-th entry in the sample and an edge
// of the bracket: csrc/cpu/topm.cpp has the reasons.
static int64_t sample_size(int64_t n) {
    int64_t s = 1 << 12;
    while (s < (1 << 22) && double(s) * double(s) * double(s) < double(n) * double(n)) s *= 2;
    return s;
}
static int64_t sample_margin(int64_t s, int64_t n, int64_t m, bool unrepairable) {
    const double q = double(m) / double(n);
    const double sigma = __builtin_sqrt(double(s) * q * (1.0 - q));
    return unrepairable ? int64_t(12.0 * sigma) + 64 : int64_t(5.0 * sigma) + 16;
}

struct Layout {
    std::vector<int64_t> table, groups;
    int64_t chunks = 0, samples = 0, pool = 0, list = 0, largest_sample = 0, largest_pool = 0, problems = 0;
    int64_t rows = 0, journal = 0;               // 0 without a journal
    bool exact = false, beyond_a_chunk = false;  // a group is not sampled; and has several chunks
    bool same[4] = {true, true, true, true};     // by dtype: every array of every tensor has it, and no importance
    int64_t bytes = 0;
    int64_t histogram_at, tickets_at, chosen_at, zero_end, tables_at, state_at, problems_at, greater_at, equal_at,
        tiles_at, places_at, marks_at, journal_at, sample_keys_at, sample_indices_at, pool_keys_at, pool_indices_at,
        list_keys_at, list_indices_at;
};

static int64_t tags_of(const TopmTensor& t, bool with_params) {
    const int64_t f64 = int64_t(DType::f64);
    const auto aligned = [](int64_t address) { return address % 16 == 0; };
    int64_t tags = t.base_dtype << 4 | t.tuned_dtype << 8;
    tags |= with_params ? t.params_dtype : t.base_dtype;
    tags |= (t.importance_dtype < 0 ? kNoImportance : t.importance_dtype) << 12;
    if (aligned(t.base) && aligned(t.tuned) && (!with_params || aligned(t.params)) &&
        (t.importance_dtype < 0 || aligned(t.importance)))
        tags |= kAligned;
    if (t.base_dtype == f64 || t.tuned_dtype == f64 || (with_params && t.params_dtype == f64)) tags |= kInDouble;
    return tags;
}

// Calls function(M{}, A{}), by the dtypes of the call. M: how the passes read tensors; A: how those do that are rarely
// run, which is any dtype.
template <class Function>
static int by_dtypes(const TopmCall& call, const Layout& l, const Function& function) {
    using Any = Mixed<float, uint32_t>;
    using Wide = Mixed<double, uint64_t>;
    if (call.wide) return function(Wide{}, Wide{});
    if (l.same[int(DType::bf16)]) return function(Same<bf16_t>{}, Any{});
    if (l.same[int(DType::f16)]) return function(Same<f16_t>{}, Any{});
    if (l.same[int(DType::f32)]) return function(Same<float>{}, Any{});
    return function(Any{}, Any{});
}

static Layout lay_out(const TopmCall& call) {
    Layout l;
    const TopmTensor* tensors = reinterpret_cast<const TopmTensor*>(call.tensors);
    const int64_t* m = reinterpret_cast<const int64_t*>(call.m);
    const int64_t n = call.num_tensors, num_groups = call.per_tensor ? n : 1;
    for (int64_t i = 0; i < n; ++i) {
        const TopmTensor& t = tensors[i];
        const int64_t tags = tags_of(t, !call.select);
        for (int dtype = 0; dtype < 4; ++dtype)
            l.same[dtype] = l.same[dtype] && (tags & 0xffff) == (dtype | dtype << 4 | dtype << 8 | kNoImportance << 12);
        l.table.insert(l.table.end(), {t.params, t.base, t.tuned, t.importance, tags, t.numel, t.first, l.chunks});
        l.chunks += (t.numel + call.chunk - 1) / call.chunk;
    }
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t first = call.per_tensor ? g : 0, count = call.per_tensor ? 1 : n;
        const TopmTensor& last = tensors[first + count - 1];
        const int64_t size = last.first + last.numel - tensors[first].first;
        const int64_t chunk = l.table[size_t(first * kTensorWords + kFirstChunk)];
        const int64_t next =
            first + count < n ? l.table[size_t((first + count) * kTensorWords + kFirstChunk)] : l.chunks;
        const bool sampled = m[g] > 0 && size > 0 && !(call.hooks & kHookTwoPass) &&
                             (size > kUnsampled || (call.hooks & kHookAlwaysSample));
        int64_t s = 0, rank_a = 0, rank_b = 0, capacity = 0;
        if (sampled) {
            s = sample_size(size);
            const int64_t middle = int64_t(double(s) * (double(m[g]) / double(size)));
            const int64_t up = sample_margin(s, size, m[g], call.one_pass != 0);
            const int64_t down = sample_margin(s, size, m[g], false);
            rank_a = middle - up;
            rank_b = middle + down + 1;
            if (call.hooks & kHookTooFew) rank_b = rank_a;
            if (call.hooks & kHookTooMany) rank_a = rank_b = s;
            const double room = 1.5 * double(up + down) / double(s) * double(size) + 4096.0;
            capacity = call.hooks & kHookOverflow ? 0 : room < double(size) ? int64_t(room) : size;
        }
        l.groups.insert(l.groups.end(), {m[g], size, s, l.samples, rank_a, rank_b, l.pool, capacity, l.list, first,
                                         count, tensors[first].first, chunk, next - chunk, l.journal});
        l.samples += s;
        l.pool += capacity;
        l.journal += sampled ? m[g] : 0;
        l.list += s / 4 * kProblems;
        l.exact = l.exact || (!sampled && m[g] > 0);
        l.beyond_a_chunk = l.beyond_a_chunk || (!sampled && m[g] > 0 && next - chunk > 1);
        l.largest_sample = s > l.largest_sample ? s : l.largest_sample;
        l.largest_pool = capacity > l.largest_pool ? capacity : l.largest_pool;
    }
    l.problems = num_groups * (l.samples > 0 ? kProblems : 1);
    const bool journaled = call.one_pass && call.indices != 0;
    const TopmTensor& last = tensors[n - 1];
    l.rows = journaled ? (last.first + last.numel) / kRow + n : 0;
    l.journal = journaled ? l.journal : 0;
    const int old_bytes =
        by_dtypes(call, l, [](auto m, auto) { return int(sizeof(typename OldBits<decltype(m)>::type)); });
    const int64_t key = call.wide ? 8 : 4;
    const auto take = [&](int64_t bytes) {
        const int64_t at = l.bytes;
        l.bytes += (bytes + 255) / 256 * 256;
        return at;
    };
    l.histogram_at = take(l.problems * kBins * 8);
    l.tickets_at = take((l.problems + 1) * 4);
    l.chosen_at = take(l.rows * kRowWords * 4);
    l.zero_end = l.bytes;
    l.tables_at = take(int64_t(l.table.size() + l.groups.size()) * 8);
    l.state_at = take(num_groups * kStateWords * 8);
    l.problems_at = take(l.problems * kProblemWords * 8);
    l.greater_at = take(l.chunks * 4);
    l.equal_at = take(l.chunks * 4);
    l.tiles_at = take(((l.chunks + kStep - 1) / kStep + 1) * 8);
    l.places_at = take(l.journal);
    l.marks_at = take(l.rows * 8);
    l.journal_at = take(l.journal * old_bytes);
    l.sample_keys_at = take(l.samples * key);
    l.sample_indices_at = take(l.samples * 8);
    l.pool_keys_at = take(l.pool * key);
    l.pool_indices_at = take(l.pool * 8);
    l.list_keys_at = take(l.list * key);
    l.list_indices_at = take(l.list * 8);
    return l;
}

template <class Key>
static View<Key> view_of(const TopmCall& call, const Layout& l) {
    const int64_t n = call.num_tensors, num_groups = call.per_tensor ? n : 1;
    const auto words = [&](int64_t at, int64_t count) { return simt::global<int64_t>(call.scratch + at, count); };
    View<Key> v;
    v.table = words(l.tables_at, n * kTensorWords);
    v.groups = words(l.tables_at + n * kTensorWords * 8, num_groups * kGroupWords);
    v.state = words(l.state_at, num_groups * kStateWords);
    v.problems = words(l.problems_at, l.problems * kProblemWords);
    v.histogram = words(l.histogram_at, l.problems * kBins);
    v.tickets = simt::global<uint32_t>(call.scratch + l.tickets_at, l.problems + 1);
    v.greater = simt::global<int32_t>(call.scratch + l.greater_at, l.chunks);
    v.equal = simt::global<int32_t>(call.scratch + l.equal_at, l.chunks);
    v.tile_sums = words(l.tiles_at, (l.chunks + kStep - 1) / kStep + 1);
    v.journal_places = simt::global<uint8_t>(call.scratch + l.places_at, l.journal);
    v.chosen = simt::global<uint32_t>(call.scratch + l.chosen_at, l.rows * kRowWords);
    v.marks = words(l.marks_at, l.rows);
    v.journal = call.scratch + l.journal_at;
    v.journal_size = l.journal;
    v.sample_keys = simt::global<Key>(call.scratch + l.sample_keys_at, l.samples);
    v.sample_indices = words(l.sample_indices_at, l.samples);
    v.pool_keys = simt::global<Key>(call.scratch + l.pool_keys_at, l.pool);
    v.pool_indices = words(l.pool_indices_at, l.pool);
    v.list_keys = simt::global<Key>(call.scratch + l.list_keys_at, l.list);
    v.list_indices = words(l.list_indices_at, l.list);
    v.kept = simt::global<int64_t>(call.kept, n);
    v.unchanged = simt::global<int64_t>(call.unchanged, n);
    v.nonfinite = simt::global<int64_t>(call.nonfinite, n);
    v.threshold = call.threshold;
    v.indices = call.indices;
    v.values = call.values;
    v.value_bytes = call.value_bytes;
    v.record = call.record;
    v.num_tensors = n;
    v.num_groups = num_groups;
    v.num_chunks = l.chunks;
    v.chunk = call.chunk;
    v.problems_each = l.problems / num_groups;
    v.per_tensor = call.per_tensor;
    v.one_pass = call.one_pass;
    v.ordered = call.indices != 0;
    v.scale = call.scale;
    v.scale_f32 = float(call.scale);
    return v;
}

// Launches in a row on one stream; after an error nothing more is launched.
class Launches {
  public:
    explicit Launches(const Target& target) : target_(target) {}
    template <class... Parameters, class... Arguments>
    void operator()(const char* name, int64_t blocks, void (*kernel)(Parameters...), Arguments... arguments) {
        if (error_ == 0) error_ = launch(name, target_, blocks, kThreads, kernel, arguments...);
    }
    void add(int error) { error_ = error_ != 0 ? error_ : error; }
    int error() const { return error_; }

  private:
    Target target_;
    int error_ = 0;
};

// Blocks that go over the tensors for an exact select. Where all groups are sampled they nearly never have to: one
// wave, which leaves at once.
static int64_t walkers(const TopmCall& call, const Layout& l) {
    return blocks_for(l.chunks, l.exact ? call.blocks : (call.blocks + 7) / 8);
}

template <class M, Output kOutput>
static void launch_apply(Launches& run, const View<typename M::Key>& v, int64_t blocks) {
    run("topm_apply", blocks, topm_apply<M, kOutput>, v);
}

template <class M, class A>
static int settle_as(const TopmCall& call, const Layout& l, const Target& target) {
    using Key = typename M::Key;
    const View<Key> v = view_of<Key>(call, l);
    const int64_t groups = v.num_groups;
    Launches run(target);
    // The tables travel as arguments, the end of them with the launch that opens scratch and outputs.
    std::vector<int64_t> tables = l.table;
    tables.insert(tables.end(), l.groups.begin(), l.groups.end());
    const int64_t size = int64_t(tables.size()), before = (size - 1) / kWords * kWords;
    run.add(put_words(target, call.scratch + l.tables_at, tables.data(), before));
    Words last = {};
    for (int64_t i = before; i < size; ++i) last.at[i - before] = tables[size_t(i)];
    const int64_t zeros = l.zero_end / 8, rows = zeros / 4 > v.num_tensors ? zeros / 4 : v.num_tensors;
    run("topm_open", blocks_for((rows + kThreads - 1) / kThreads, call.blocks), topm_open<Key>, v,
        simt::global<int64_t>(call.scratch + l.tables_at, size), last, before, size - before,
        simt::global<int64_t>(call.scratch, zeros), zeros);
    // Blocks per problem: as many for each, so that a block need not search whose it is.
    int64_t share = 0;
    const auto blocks_over = [&](int64_t pairs, int64_t each, int64_t problems) {
        const int64_t most = call.blocks / problems, wanted = blocks_for((pairs + each - 1) / each, most);
        return wanted > 1 ? wanted : 1;
    };
    if (l.samples > 0) {
        const int64_t share_sample = blocks_over(l.largest_sample, kStep, 2 * groups);
        share = blocks_over(l.largest_pool, kStep, groups);
        run("topm_sample", l.samples / kThreads, topm_sample<Key>, v);
        const int64_t s = call.hooks & kHookNarrow ? kAlone << 8 : l.largest_sample;
        for (int64_t left = s; left > kAlone; left /= 16)
            run("topm_bracket", groups * 2 * share_sample, topm_bracket<Key, false>, v, share_sample);
        run("topm_bracket", groups * 2 * share_sample, topm_bracket<Key, true>, v, share_sample);
        const int64_t passes = blocks_for(l.chunks, call.blocks);
        if (v.journaled())
            run("topm_sweep", passes, topm_sweep<M, kEditAndNote>, v);
        else if (call.one_pass)
            run("topm_sweep", passes, topm_sweep<M, kEdit>, v);
        else
            run("topm_sweep", passes, topm_sweep<M, kLook>, v);
    }
    const int64_t walk = walkers(call, l);
    const int steps = l.samples > 0 || l.beyond_a_chunk ? kDigits<Key> + 1 : l.exact ? 1 : 0;
    for (int step = 0; step < steps; ++step) {
        if (step == kDigits<Key> && share > 0) share = blocks_over(l.largest_pool, kThreads, groups);
        run("topm_settle", groups * share + walk, topm_settle<A>, v, step, share);
    }
    if (call.one_pass && !v.journaled() && steps > 0) launch_apply<A, kEditOnly>(run, v, walk);
    return run.error();
}

template <class M, class A>
static int apply_as(const TopmCall& call, const Layout& l, const Target& target) {
    const View<typename M::Key> v = view_of<typename M::Key>(call, l);
    const int64_t blocks = blocks_for(l.chunks, call.blocks);
    Launches run(target);
    if (call.indices != 0)
        run("topm_scan_chunks", (l.chunks + kStep - 1) / kStep + (v.journaled() ? walkers(call, l) : 0),
            topm_scan_chunks<A>, v);
    if (call.select)
        launch_apply<A, kList>(run, v, blocks);
    else if (v.journaled())
        run("topm_record", blocks, topm_record<typename M::Key, typename OldBits<M>::type>, v);
    else
        launch_apply<M, kEditOnly>(run, v, blocks);
    return run.error();
}

template <class M>
static int restore_as(const TopmCall& call, const Layout& l, const Target& target) {
    using Key = typename M::Key;
    const View<Key> v = view_of<Key>(call, l);
    Launches run(target);
    run("topm_restore", blocks_for(l.chunks, call.blocks), topm_restore<Key, typename OldBits<M>::type>, v);
    return run.error();
}

int64_t topm_scratch_bytes(const TopmCall& call) { return lay_out(call).bytes; }

int topm_settle(const TopmCall& call, const Target& target) {
    constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
    const bool record = call.indices != 0 && !call.select;
    if (call.chunk % kRow != 0 || call.chunk > kLargestChunk || (record && !call.one_pass)) return kInvalidValue;
    const Layout l = lay_out(call);
    return by_dtypes(call, l, [&](auto m, auto a) { return settle_as<decltype(m), decltype(a)>(call, l, target); });
}
int topm_apply(const TopmCall& call, const Target& target) {
    const Layout l = lay_out(call);
    return by_dtypes(call, l, [&](auto m, auto a) { return apply_as<decltype(m), decltype(a)>(call, l, target); });
}
int topm_restore(const TopmCall& call, const Target& target) {
    const Layout l = lay_out(call);
    return by_dtypes(call, l, [&](auto m, auto) { return restore_as<decltype(m)>(call, l, target); });
}

}  // namespace cuda
}  // namespace pse
