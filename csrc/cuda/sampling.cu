// Guided sampling: one token per row from integer weights, several blocks per row whatever the batch.
// Bytes  every logit once from memory. The later launches read them again, from L2 where a batch fits it: for 16-bit
//        logits with one guide that is 4 bytes per token and launch, against 4 written and 4 read for z kept in fp32,
//        and no scratch of the batch's size. (For fp32 logits it is 8 against 8 without filters, 16 against 12 with.)
// Floor  B = 32, V = 128256, bf16 base and guide: 16.4 MB, 3.9 us at 4.25 TB/s; fp32 32.8 MB, 7.7 us.
// Story  1 combine: z = base + sum w_g * guide_g, the largest key of every chunk; a bad value is a key above infinity
//        2 weigh: the row's best from its chunks; masses of chunks; for top-k and top-p a histogram over exponents.
//          The row's last block draws; with filters it finds the bins that hold the thresholds
//        3 settle: lists the keys of those bins and the masses above them. The row's last block finds the threshold
//          among the listed keys and draws
// Order  every sum is an integer: the same token for every grid, block size and order of blocks. Only a key is searched
//        for, since all ties with it are kept: no order among equals is needed.
// Unlucky A bin that ties flood makes the list long (up to the row), never the work unbounded: at most four passes of
//        a radix select over it (six in small blocks), and none where all of its keys are equal.
// Bad    tokens start as -1 and log-probs as NaN; a row without a distribution leaves them so and costs no other row.
#include "cuda/sampling.h"

#include "core/guided.h"
#include "core/philox.h"
#include "core/sampling_weight.h"
#include "cuda/simt.cuh"

namespace pse {
namespace cuda {
namespace {

using namespace simt;
using namespace PSE_ISA;

constexpr int kGroup = 8;  // neighbouring tokens of a thread: one 16-byte load of a 16-bit dtype

// Threads per multiprocessor for which all launches but the first may take registers: 64 each. Not told, ptxas aims at
// more and spills in the last block's code, which decides nothing about bandwidth.
constexpr int kResident = 1024;

// Bins of 1/16 octave over exponents down to -40.5. Below, every weight is 0, so no filter changes the draw there.
constexpr int kBins = 648;
PSE_HD int bin_of(float exponent) { return int32_t(mul_rn(exponent, -16.0f)); }

// Sums of weights in 32-bit shared atomics (64-bit ones are loops of compare-and-swap): the low 20 bits and the rest.
// 4095 weights of up to 2^40 fit both.
constexpr int kLowBits = 20;
constexpr uint64_t kBestWeight = uint64_t(1) << kFractionBits;

// What launch 2 leaves for launch 3, per row.
constexpr int kState = 6;
constexpr int kSearch = 0;     // the bins to list, see pack_bins(), or 0: nothing is left to do. Log-probs: the row's
                               // log-mass, a double
constexpr int kRank = 1;       // of the top-k threshold within its bin
constexpr int kAboveTopK = 2;  // mass of the bins above top-k's
constexpr int kAboveTopP = 3;  // mass of the bins above top-p's first
constexpr int kMass = 4;       // of the row before all filters
constexpr int kBest = 5;       // the row's best key; log-probs: with bit 32 set, so that 0 is a bad row

struct Job {
    Logits logits;
    int64_t base_count, guide_count;  // elements from the first to the last that may be read
    uint32_t chunks;                  // per row
    int64_t groups;                   // reads of a whole block, per row
    Knobs same;
    Global<const float> knobs;
    int64_t width, first_guidance;  // of a row of knobs
    Global<const int64_t> counters;
    Global<const uint64_t> words;
    bool row_in_counter;
    Global<int64_t> tokens;  // null for guided_logprobs
    Global<float> logprobs;  // [rows] or null
    Global<float> out;       // [rows, columns], guided_logprobs
    int64_t columns;
    // scratch
    Global<uint64_t> state;             // [rows, kState]
    Global<uint64_t> mass, kept;        // [rows, chunks]: before the filters, after them
    Global<int32_t> best;               // [rows, chunks]: largest key
    Global<uint32_t> tickets;           // [rows, 2]
    Global<uint64_t> bin_mass;          // [rows, kBins], and all below, with filters only
    Global<uint32_t> bin_count;         // [rows, kBins]
    Global<int32_t> list;               // [rows, vocab]: keys in the bins that are searched, a piece per chunk
    Global<uint32_t> list_end;          // [rows]
    Global<uint32_t> piece, piece_end;  // [rows, chunks]: where a chunk's piece of the list lies
};

// ---- over a block

struct Sum {
    template <class T>
    PSE_HD T operator()(T a, T b) const {
        return a + b;
    }
};
struct Larger {
    template <class T>
    PSE_HD T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};
struct Smaller {
    template <class T>
    PSE_HD T operator()(T a, T b) const {
        return a < b ? a : b;
    }
};

// Joins a value of every thread; all threads get the result.
template <int kThreads, class T, class Join>
PSE_DEVICE T block_reduce(T x, Join join) {
    PSE_SHARED(T, parts, kThreads / kWarp);
    PSE_UNROLL
    for (int by = kWarp / 2; by > 0; by /= 2) x = join(x, shuffle_xor(x, by));
    sync_block();  // parts may still be read by an earlier call
    if (lane() == 0) store(parts, warp(), x);
    sync_block();
    T all = load(parts, 0);
    PSE_UNROLL
    for (int i = 1; i < kThreads / kWarp; ++i) all = join(all, load(parts, i));
    return all;
}

template <class T>
struct Prefix {
    T before, total;  // the sum over lower threads; over all
};

template <int kThreads, class T>
PSE_DEVICE Prefix<T> block_prefix(T own) {
    PSE_SHARED(T, sums, kThreads / kWarp);
    T inclusive = own;
    PSE_UNROLL
    for (int by = 1; by < kWarp; by *= 2) {
        const T lower = shuffle_up(inclusive, by);
        inclusive += lane() >= by ? lower : T(0);
    }
    sync_block();  // sums may still be read by an earlier call
    if (lane() == kWarp - 1) store(sums, warp(), inclusive);
    sync_block();
    T before = inclusive - own, total = 0;
    PSE_UNROLL
    for (int i = 0; i < kThreads / kWarp; ++i) {
        const T sum = load(sums, i);
        before += i < warp() ? sum : T(0);
        total += sum;
    }
    return {before, total};
}

template <class T>
struct Reached {
    int index;  // of the first value at which the running sum reaches the target; the count of values if none does
    T before;   // the sum of those before it
};

// value(i) for i in [0, n); target >= 1.
template <int kThreads, class T, class Value>
PSE_DEVICE Reached<T> first_reaching(int n, T target, const Value& value) {
    PSE_SHARED(int, found, 1);
    PSE_SHARED(T, sum_before, 1);
    const int each = (n + kThreads - 1) / kThreads;
    const int first = Smaller()(thread() * each, n), end = Smaller()(first + each, n);
    T own = 0;
    for (int i = first; i < end; ++i) own += value(i);
    const Prefix<T> prefix = block_prefix<kThreads>(own);
    if (prefix.before < target && target <= prefix.before + own) {
        T before = prefix.before;
        int i = first;
        for (T here_value = value(i); before + here_value < target; here_value = value(i)) {
            before += here_value;
            ++i;
        }
        store(found, 0, i);
        store(sum_before, 0, before);
    }
    sync_block();
    if (target > prefix.total) return {n, prefix.total};
    return {load(found, 0), load(sum_before, 0)};
}

template <int kThreads>
PSE_DEVICE uint64_t sum_of(Global<const uint64_t> values, int64_t first, int n) {
    uint64_t own = 0;
    for (int i = thread(); i < n; i += kThreads) own += load(values, first + i);
    return block_reduce<kThreads>(own, Sum());
}

// ---- a row's parameters

struct Row {
    Knobs knobs;
    bool good;
    bool greedy, by_rank, by_mass;
    float c;         // log2(e) / temperature
    uint64_t floor;  // min-p: the least weight
};

PSE_DEVICE float guidance_of(const Job& a, int64_t row, int64_t guide) {
    return a.knobs == nullptr ? a.same.guidance : load(a.knobs, row * a.width + a.first_guidance + guide);
}

PSE_DEVICE Row read_row(const Job& a, int64_t row) {
    Row r = {};
    r.knobs = a.same;
    if (a.knobs != nullptr) {
        r.knobs.temperature = load(a.knobs, row * a.width);
        if (a.counters != nullptr) {
            r.knobs.top_p = load(a.knobs, row * a.width + 1);
            r.knobs.min_p = load(a.knobs, row * a.width + 2);
            r.knobs.top_k = load(a.counters, row * 3);
            r.knobs.seed = load(a.counters, row * 3 + 1);
            r.knobs.offset = load(a.counters, row * 3 + 2);
        }
    }
    const Knobs& k = r.knobs;
    r.good = valid_parameters(k.temperature, k.top_p, k.min_p, k.top_k, k.seed, k.offset);
    for (int64_t guide = 0; guide < a.logits.guides; ++guide)
        r.good = r.good && finite_number(guidance_of(a, row, guide));
    r.greedy = k.temperature == 0.0f;
    if (a.tokens == nullptr) r.good = r.good && !r.greedy;
    r.by_rank = !r.greedy && k.top_k > 0 && k.top_k < a.logits.vocab;
    r.by_mass = !r.greedy && k.top_p < 1.0f;
    r.c = inverse_temperature(r.greedy ? 1.0f : k.temperature);
    if (!r.greedy) r.floor = k.min_p < 1.0f ? fixed_point(k.min_p, kFractionBits) : kBestWeight;
    return r;
}

PSE_DEVICE uint64_t word_of(const Job& a, int64_t row, const Row& r) {
    if (a.words != nullptr) return load(a.words, row);
    return philox_u64(uint64_t(r.knobs.seed), uint64_t(r.knobs.offset), a.row_in_counter ? uint64_t(row) : 0);
}

// Weights of a row: relative to its best token.
struct Scale {
    int32_t best_key;
    float best, c;
    PSE_HD float exponent(float z) const { return exponent_of(z, best, c); }
    PSE_HD uint64_t weight(float z) const { return weight_of_exponent(exponent(z)); }
    PSE_HD int bin(float z) const { return bin_of(exponent(z)); }
};

PSE_DEVICE Scale scale_of(int32_t best_key, float c) { return {best_key, float_of_key(best_key), c}; }

// ---- z, a group of tokens at a time

PSE_DEVICE float to_float(float x) { return x; }
PSE_DEVICE float to_float(double x) { return float(x); }
PSE_DEVICE float to_float(f16_t x) { return f16_to_float(x.bits); }
PSE_DEVICE float to_float(bf16_t x) { return bf16_to_float(x.bits); }

// A block reads kThreads * kGroup neighbouring tokens at once, a thread kGroup of them. A chunk is kGroups such reads,
// one after the other: more blocks at a time hide the latency, where more registers a thread would not.
struct Group {
    float z[kGroup];
};

template <int kThreads>
PSE_DEVICE int64_t first_token(int64_t group) {
    return (group * kThreads + thread()) * kGroup;
}

// The reads of a chunk: those that begin within the vocabulary.
template <int kGroups>
PSE_DEVICE int64_t first_group(int64_t chunk) {
    return chunk * kGroups;
}
template <int kGroups>
PSE_DEVICE int64_t end_group(const Job& a, int64_t chunk) {
    return Smaller()((chunk + 1) * kGroups, a.groups);
}

template <class T>
PSE_DEVICE Group read_as(const void* data, int64_t count, int64_t at, int64_t left) {
    constexpr int kVector = 16 / int(sizeof(T));
    const Global<const T> p = global<const T>(data, count);
    Group group;
    if (left >= kGroup && is_aligned(p, at, 16)) {
        PSE_UNROLL
        for (int v = 0; v < kGroup; v += kVector) {
            const auto raw = load_vector<kVector>(p, at + v);
            PSE_UNROLL
            for (int i = 0; i < kVector; ++i) group.z[v + i] = to_float(raw.at[i]);
        }
    } else {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) group.z[i] = i < left ? to_float(load(p, at + i)) : kMinusInfinity;
    }
    return group;
}

// The dtype is a branch per read, not a template: 16 pairs of dtypes are one kernel.
PSE_DEVICE Group read_logits(const void* data, DType dtype, int64_t count, int64_t at, int64_t left) {
    switch (dtype) {
        case DType::f64: return read_as<double>(data, count, at, left);
        case DType::f16: return read_as<f16_t>(data, count, at, left);
        case DType::bf16: return read_as<bf16_t>(data, count, at, left);
        default: return read_as<float>(data, count, at, left);
    }
}

// z from token `first` on; -inf beyond the vocabulary.
PSE_DEVICE Group combined(const Job& a, int64_t row, int64_t first) {
    const Logits& l = a.logits;
    const int64_t left = l.vocab - first;
    Group z = read_logits(l.base, l.base_dtype, a.base_count, row * l.base_stride + first, left);
    for (int64_t n = 0; n < l.guides; ++n) {
        const float w = guidance_of(a, row, n);
        if (w == 0.0f) continue;  // not read: 0 * -inf would be NaN
        const int64_t at = n * l.guide_stride + row * l.guide_row_stride + first;
        const Group guide = read_logits(l.guide, l.guide_dtype, a.guide_count, at, left);
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) z.z[i] = guided(z.z[i], guide.z[i], w);
    }
    PSE_UNROLL
    for (int i = 0; i < kGroup; ++i) z.z[i] = add_rn(z.z[i], 0.0f);  // -0 and +0 are one key
    return z;
}

// ---- 1. combine

// Scratch comes as it is, so the row's first block makes it ready for the next launches.
template <int kThreads>
PSE_DEVICE void clear_row(const Job& a, int64_t row) {
    for (int i = thread(); i < kState; i += kThreads) store(a.state, row * kState + i, uint64_t(0));
    for (int i = thread(); i < 2; i += kThreads) store(a.tickets, row * 2 + i, 0u);
    if (thread() == 0 && a.tokens != nullptr) store(a.tokens, row, int64_t(-1));
    if (thread() == 0 && a.logprobs != nullptr) store(a.logprobs, row, bits_float(0x7fc00000u));
    if (a.list == nullptr) return;
    if (thread() == 0) store(a.list_end, row, 0u);
    for (int i = thread(); i < kBins; i += kThreads) {
        store(a.bin_count, row * kBins + i, 0u);
        store(a.bin_mass, row * kBins + i, uint64_t(0));
    }
}

template <int kThreads, int kGroups>
PSE_KERNEL(kThreads)
sampling_combine(Job a) {
    const int64_t row = uint32_t(block()) / a.chunks, chunk = uint32_t(block()) % a.chunks;
    if (chunk == 0) clear_row<kThreads>(a, row);
    int32_t best = INT32_MIN, worst = INT32_MAX;
    for (int64_t group = first_group<kGroups>(chunk); group < end_group<kGroups>(a, chunk); ++group) {
        const Group tokens = combined(a, row, first_token<kThreads>(group));
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            const int32_t key = key_of(tokens.z[i]);
            best = Larger()(best, key);
            worst = Smaller()(worst, key);
        }
    }
    // Keys order NaNs outside of [-inf, +inf]: a comparison of floats would drop them.
    best = block_reduce<kThreads>(worst < kKeyOfMinusInfinity ? INT32_MAX : best, Larger());
    if (thread() == 0) store(a.best, row * a.chunks + chunk, best);
}

// ---- 4. draw: what ends launch 2 or launch 3

struct Kept {
    int32_t key;      // at least this key
    uint64_t weight;  // and at least this weight
    PSE_HD uint64_t operator()(float z, const Scale& s) const {
        const uint64_t w = s.weight(z);
        return (key_of(z) >= key) & (w >= weight) ? w : 0;
    }
};

// What find_token() needs beside the row's parameters. chunk < 0: there is nothing to find now.
struct Drawn {
    int64_t chunk;
    uint64_t threshold, mass;
};

// By the last block of a row, when the kept masses of its chunks are there.
template <int kThreads>
PSE_DEVICE Drawn draw(const Job& a, int64_t row, const Row& r, uint64_t mass) {
    const int64_t first = row * a.chunks;
    const uint64_t kept_mass = sum_of<kThreads>(a.kept, first, int(a.chunks));
    const uint64_t threshold = mulhi64(word_of(a, row, r), kept_mass);
    const Reached<uint64_t> reached =
        first_reaching<kThreads>(int(a.chunks), threshold + 1, [&](int i) { return load(a.kept, first + i); });
    return {reached.index, threshold - reached.before, mass};
}

// Stores the chunk's first token at which the running sum of kept weights exceeds `threshold`.
template <int kThreads, int kGroups>
PSE_DEVICE void find_token(const Job& a, int64_t row, const Scale& s, const Kept& kept, const Drawn& drawn) {
    uint64_t threshold = drawn.threshold;
    for (int64_t group = first_group<kGroups>(drawn.chunk); group < end_group<kGroups>(a, drawn.chunk); ++group) {
        const Group tokens = combined(a, row, first_token<kThreads>(group));
        uint64_t own = 0;
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) own += kept(tokens.z[i], s);
        const Prefix<uint64_t> prefix = block_prefix<kThreads>(own);
        if (threshold >= prefix.total) {
            threshold -= prefix.total;
            continue;
        }
        if (prefix.before <= threshold && threshold < prefix.before + own) {
            const Row r = read_row(a, row);  // again: eight weights kept over a barrier would cost registers
            const Scale same = scale_of(s.best_key, r.c);
            uint64_t rest = threshold - prefix.before;
            float z = 0.0f;
            int index = -1;
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) {
                const uint64_t w = kept(tokens.z[i], same);
                if (index < 0 && rest < w) {
                    index = i;
                    z = tokens.z[i];
                }
                if (index < 0) rest -= w;
            }
            store(a.tokens, row, first_token<kThreads>(group) + index);
            if (a.logprobs != nullptr) {
                const double below = sub_rn(double(z), double(s.best));
                const double temperature = r.greedy ? 1.0 : double(r.knobs.temperature);
                store(a.logprobs, row, log_probability(below, temperature, log_mass(drawn.mass)));
            }
        }
        return;
    }
}

// ---- 2. weigh

struct Best {
    int32_t key;
    int64_t chunk;  // the first that has it
};

template <int kThreads>
PSE_DEVICE Best row_best(const Job& a, int64_t row) {
    uint64_t best = 0;  // the key as an unsigned number of the same order, then the complement of the chunk
    for (uint32_t i = uint32_t(thread()); i < a.chunks; i += kThreads) {
        const uint32_t key = uint32_t(load(a.best, row * a.chunks + i)) ^ 0x80000000u;
        best = Larger()(best, (uint64_t(key) << 32) | ~i);
    }
    best = block_reduce<kThreads>(best, Larger());
    return {int32_t(uint32_t(best >> 32) ^ 0x80000000u), int64_t(~uint32_t(best))};
}

PSE_HD uint64_t pack_bins(int top_k, int first, int last) {
    return (uint64_t(1) << 48) | (uint64_t(top_k) << 32) | (uint64_t(first) << 16) | uint64_t(last);
}

// By the last block of a row with filters: the bins in which the thresholds lie. top-k's is exact. top-p's target
// depends on what top-k leaves of its own bin, so its bin is known up to a range, nearly always of one or two. False
// where the filters keep all.
template <int kThreads>
PSE_DEVICE bool find_bins(const Job& a, int64_t row, const Row& r, const Scale& s, uint64_t mass) {
    const int64_t first = row * kBins;
    const auto bin_mass = [&](int i) { return load(a.bin_mass, first + i); };
    int top_k = kBins;  // none: all tokens that weigh anything are among the k best
    uint64_t rank = 0, above_top_k = 0, least = mass, most = mass;
    if (r.by_rank) {
        const auto reached = first_reaching<kThreads>(kBins, uint32_t(r.knobs.top_k),
                                                      [&](int i) { return load(a.bin_count, first + i); });
        top_k = reached.index;
        rank = uint64_t(r.knobs.top_k) - reached.before;
        if (r.by_mass && top_k < kBins) {
            above_top_k = least = sum_of<kThreads>(a.bin_mass, first, top_k);
            most = least + bin_mass(top_k);
        }
    }
    int low = top_k, high = top_k;
    uint64_t above_top_p = 0;
    if (r.by_mass) {
        const uint64_t share = fixed_point(r.knobs.top_p, 64);
        const auto reached = first_reaching<kThreads>(kBins, Larger()(mulhi64(share, least), uint64_t(1)), bin_mass);
        low = reached.index;
        above_top_p = reached.before;
        high = low;
        if (most > least)
            high = first_reaching<kThreads>(kBins, Larger()(mulhi64(share, most), uint64_t(1)), bin_mass).index;
    }
    if (low == kBins) return false;  // top-k alone, and it keeps all
    if (thread() == 0) {
        store(a.state, row * kState + kSearch, pack_bins(top_k, low, high));
        store(a.state, row * kState + kRank, rank);
        store(a.state, row * kState + kAboveTopK, above_top_k);
        store(a.state, row * kState + kAboveTopP, above_top_p);
        store(a.state, row * kState + kMass, mass);
        store(a.state, row * kState + kBest, uint64_t(uint32_t(s.best_key)));
    }
    return true;
}

// Masses of a chunk, and its part of the row's histogram: how many tokens a bin has, what they weigh.
template <int kThreads, int kGroups, bool kFilters>
PSE_DEVICE void weigh_chunk(const Job& a, int64_t row, int64_t chunk, const Scale& s, uint64_t floor, bool count,
                            bool weigh) {
    PSE_SHARED(uint32_t, counts, kFilters ? kBins : 1);
    PSE_SHARED(uint32_t, low, kFilters ? kBins : 1);
    PSE_SHARED(uint32_t, high, kFilters ? kBins : 1);
    PSE_SHARED(uint32_t, full, 1);  // tokens of the best weight: a chunk of them would overflow `high`
    const bool counted = kFilters && (count || weigh);
    uint64_t mass = 0, kept = 0;
    // A chunk that weighs nothing is not read again: most of a row at a low temperature.
    if (s.bin(float_of_key(load(a.best, row * a.chunks + chunk))) < kBins) {
        if (counted) {
            for (int i = thread(); i < kBins; i += kThreads) {
                store(counts, i, 0u);
                store(low, i, 0u);
                store(high, i, 0u);
            }
            if (thread() == 0) store(full, 0, 0u);
            sync_block();
        }
        for (int64_t group = first_group<kGroups>(chunk); group < end_group<kGroups>(a, chunk); ++group) {
            const Group tokens = combined(a, row, first_token<kThreads>(group));
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) {
                const float exponent = s.exponent(tokens.z[i]);
                const uint64_t weight = weight_of_exponent(exponent);
                mass += weight;
                kept += weight >= floor ? weight : 0;
                if (!counted || bin_of(exponent) >= kBins) continue;
                const int bin = bin_of(exponent);
                if (count) atomic_add(counts, bin, 1u);
                if (!weigh) continue;
                if (weight == kBestWeight) {
                    atomic_add(full, 0, 1u);
                } else {
                    atomic_add(low, bin, uint32_t(weight) & ((1u << kLowBits) - 1));
                    atomic_add(high, bin, uint32_t(weight >> kLowBits));
                }
            }
        }
        if (counted) {
            sync_block();
            for (int i = thread(); i < kBins; i += kThreads) {
                const uint32_t number = load(counts, i);
                uint64_t bin_mass = (uint64_t(load(high, i)) << kLowBits) + load(low, i);
                if (i == 0) bin_mass += uint64_t(load(full, 0)) << kFractionBits;
                if (number > 0) atomic_add(a.bin_count, row * kBins + i, number);
                if (bin_mass > 0) atomic_add(a.bin_mass, row * kBins + i, bin_mass);
            }
        }
    }
    mass = block_reduce<kThreads>(mass, Sum());
    kept = block_reduce<kThreads>(kept, Sum());
    if (thread() == 0) {
        store(a.mass, row * a.chunks + chunk, mass);
        store(a.kept, row * a.chunks + chunk, kept);
    }
}

template <int kThreads, int kGroups, bool kFilters>
PSE_KERNEL(kThreads, kResident / kThreads)
sampling_weigh(Job a) {
    const int64_t row = uint32_t(block()) / a.chunks, chunk = uint32_t(block()) % a.chunks;
    const Best best = row_best<kThreads>(a, row);
    bool greedy;
    {
        const Row r = read_row(a, row);
        if (!r.good || best.key >= kKeyOfInfinity || best.key <= kKeyOfMinusInfinity) return;
        greedy = r.greedy;
        if (!greedy || a.logprobs != nullptr)
            weigh_chunk<kThreads, kGroups, kFilters>(a, row, chunk, scale_of(best.key, r.c), r.floor, r.by_rank,
                                                     r.by_mass);
    }
    // Greedy: the first of the best is the first at which their running sum exceeds 0. Alone it needs no masses.
    Drawn drawn = {best.chunk, 0, 0};
    if (greedy && a.logprobs == nullptr) {
        if (chunk != best.chunk) return;
    } else {
        if (!last_block(a.tickets, row * 2, a.chunks)) return;
        drawn.mass = sum_of<kThreads>(a.mass, row * a.chunks, int(a.chunks));
    }
    if (a.tokens == nullptr) {
        if (thread() == 0) {
            store(a.state, row * kState + kSearch, double_bits(log_mass(drawn.mass)));
            store(a.state, row * kState + kBest, (uint64_t(1) << 32) | uint32_t(best.key));
        }
        return;
    }
    const Row r = read_row(a, row);  // again: keeping it would cost registers
    const Scale s = scale_of(best.key, r.c);
    if (kFilters && (r.by_rank || r.by_mass) && find_bins<kThreads>(a, row, r, s, drawn.mass)) return;
    if (!greedy) drawn = draw<kThreads>(a, row, r, drawn.mass);
    find_token<kThreads, kGroups>(a, row, s, {greedy ? best.key : kKeyOfMinusInfinity, r.floor}, drawn);
}

// ---- 3. settle

// The largest key such that the listed keys of `bin` with that key or a larger one measure at least `target` >= 1:
// their number, or their mass. The keys are searched as distances from the bin's best, a digit a pass from the first
// digit that differs on.
template <int kThreads, bool kByMass>
PSE_DEVICE int32_t select_key(Global<const int32_t> list, int64_t n, const Scale& s, int bin, uint64_t target) {
    constexpr int kDigitBits = kThreads == 256 ? 8 : 6;  // a digit value per thread
    static_assert(1 << kDigitBits == kThreads, "blocks are of 64 or 256 threads");
    constexpr int64_t kRound = int64_t(kThreads) * (4096 / kThreads - 1);  // keys between two looks at the sums
    PSE_SHARED(uint32_t, low, kThreads);
    PSE_SHARED(uint32_t, high, kThreads);
    PSE_SHARED(uint32_t, chosen, 1);
    PSE_SHARED(uint64_t, passed, 1);

    uint32_t nearest = UINT32_MAX, farthest = 0;  // below the row's best
    for (int64_t i = thread(); i < n; i += kThreads) {
        const int32_t key = load(list, i);
        if (s.bin(float_of_key(key)) != bin) continue;
        const uint32_t below = uint32_t(s.best_key) - uint32_t(key);
        nearest = Smaller()(nearest, below);
        farthest = Larger()(farthest, below);
    }
    nearest = block_reduce<kThreads>(nearest, Smaller());
    farthest = block_reduce<kThreads>(farthest, Larger());

    int shift = 0;  // of the digit before the first
    while (shift < 32 && ((farthest - nearest) >> shift) != 0) shift += kDigitBits;
    uint64_t digits = 0;
    while (shift > 0) {
        shift -= kDigitBits;
        uint64_t own = 0;  // of the keys with this thread's digit
        for (int64_t round = 0; round < n; round += kRound) {
            store(low, thread(), 0u);
            store(high, thread(), 0u);
            sync_block();
            for (int64_t i = round + thread(); i < Smaller()(round + kRound, n); i += kThreads) {
                const float z = float_of_key(load(list, i));
                const uint64_t distance = uint32_t(s.best_key) - uint32_t(key_of(z)) - nearest;
                if (s.bin(z) != bin || (distance >> (shift + kDigitBits)) != digits) continue;
                const int digit = int(distance >> shift) & (kThreads - 1);
                const uint64_t weight = kByMass ? s.weight(z) : 1;
                atomic_add(low, digit, uint32_t(weight) & ((1u << kLowBits) - 1));
                if (kByMass) atomic_add(high, digit, uint32_t(weight >> kLowBits));
            }
            sync_block();
            own += (uint64_t(load(high, thread())) << kLowBits) + load(low, thread());
        }
        const Prefix<uint64_t> prefix = block_prefix<kThreads>(own);
        if (prefix.before < target && target <= prefix.before + own) {
            store(chosen, 0, uint32_t(thread()));
            store(passed, 0, prefix.before);
        }
        sync_block();
        digits = (digits << kDigitBits) | load(chosen, 0);
        target -= load(passed, 0);
    }
    return int32_t(uint32_t(s.best_key) - nearest - uint32_t(digits));
}

struct Search {
    int top_k, low, high;  // top-k's bin or kBins, the range of top-p's
    PSE_HD bool holds(int bin) const { return (bin >= low && bin <= high) || bin == top_k; }
    PSE_HD int last() const { return top_k < kBins ? top_k : high; }  // top-p's bins are not below top-k's
};

// By the last block of a row: the key from which on tokens are kept by top-k and top-p.
template <int kThreads>
PSE_DEVICE int32_t settle_key(const Job& a, int64_t row, const Row& r, const Scale& s, const Search& search) {
    const auto state = [&](int i) { return load(a.state, row * kState + i); };
    const Global<const int32_t> list = a.list + row * a.logits.vocab;
    const int64_t n = load(a.list_end, row);
    int32_t key = kKeyOfMinusInfinity;
    uint64_t available = state(kMass);
    if (search.top_k < kBins) {
        key = select_key<kThreads, false>(list, n, s, search.top_k, state(kRank));
        if (r.by_mass) {
            uint64_t own = 0;
            for (int64_t i = thread(); i < n; i += kThreads) {
                const float z = float_of_key(load(list, i));
                if (key_of(z) >= key && s.bin(z) == search.top_k) own += s.weight(z);
            }
            available = state(kAboveTopK) + block_reduce<kThreads>(own, Sum());
        }
    }
    if (!r.by_mass) return key;
    uint64_t target = Larger()(mulhi64(fixed_point(r.knobs.top_p, 64), available), uint64_t(1)) - state(kAboveTopP);
    const auto reached = first_reaching<kThreads>(
        search.high - search.low + 1, target, [&](int i) { return load(a.bin_mass, row * kBins + search.low + i); });
    return select_key<kThreads, true>(list, n, s, search.low + reached.index, target - reached.before);
}

// Lists the chunk's keys in the bins that are searched, and sums up what is surely kept.
template <int kThreads, int kGroups>
PSE_DEVICE void list_chunk(const Job& a, int64_t row, int64_t chunk, const Search& search, const Scale& s,
                           uint64_t floor) {
    PSE_SHARED(uint32_t, piece, 1);
    uint64_t kept = 0;
    uint32_t count = 0, start = 0;
    if (s.bin(float_of_key(load(a.best, row * a.chunks + chunk))) <= search.last()) {
        const int64_t first = first_group<kGroups>(chunk), end = end_group<kGroups>(a, chunk);
        uint32_t listed = 0;  // a bit per token of this thread, the first group's in the lowest
        for (int64_t group = first; group < end; ++group) {
            const Group tokens = combined(a, row, first_token<kThreads>(group));
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) {
                const float exponent = s.exponent(tokens.z[i]);
                const uint64_t weight = weight_of_exponent(exponent);
                kept += bin_of(exponent) < search.low && weight >= floor ? weight : 0;
                listed |= uint32_t(search.holds(bin_of(exponent))) << (int(group - first) * kGroup + i);
            }
        }
        kept = block_reduce<kThreads>(kept, Sum());
        const Prefix<uint32_t> prefix = block_prefix<kThreads>(uint32_t(count_bits(listed)));
        count = prefix.total;
        if (count > 0) {
            if (thread() == 0) store(piece, 0, atomic_add(a.list_end, row, count));
            sync_block();
            start = load(piece, 0);
            int64_t to = row * a.logits.vocab + start + prefix.before;
            // Read again where something is listed: keeping z would cost registers in every thread.
            for (int64_t group = first; listed != 0; ++group, listed >>= kGroup) {
                if ((listed & ((1u << kGroup) - 1)) == 0) continue;
                const Group tokens = combined(a, row, first_token<kThreads>(group));
                PSE_UNROLL
                for (int i = 0; i < kGroup; ++i)
                    if ((listed >> i) & 1u) store(a.list, to++, key_of(tokens.z[i]));
            }
        }
    }
    if (thread() == 0) {
        store(a.kept, row * a.chunks + chunk, kept);
        store(a.piece, row * a.chunks + chunk, start);
        store(a.piece_end, row * a.chunks + chunk, start + count);
    }
}

template <int kThreads, int kGroups>
PSE_KERNEL(kThreads, kResident / kThreads)
sampling_settle(Job a) {
    const int64_t row = uint32_t(block()) / a.chunks, chunk = uint32_t(block()) % a.chunks;
    const uint64_t bins = load(a.state, row * kState + kSearch);
    if (bins == 0) return;  // the row is bad, or its token is drawn
    const Search search = {int(bins >> 32) & 0xffff, int(bins >> 16) & 0xffff, int(bins) & 0xffff};
    const int32_t best_key = int32_t(uint32_t(load(a.state, row * kState + kBest)));
    {
        const Row r = read_row(a, row);
        list_chunk<kThreads, kGroups>(a, row, chunk, search, scale_of(best_key, r.c), r.floor);
    }
    if (!last_block(a.tickets, row * 2 + 1, a.chunks)) return;

    const Row r = read_row(a, row);  // again: keeping it would cost registers
    const Scale s = scale_of(best_key, r.c);
    const Kept chosen = {settle_key<kThreads>(a, row, r, s, search), r.floor};
    for (uint32_t c = uint32_t(warp()); c < a.chunks; c += kThreads / kWarp) {
        const int64_t at = row * a.chunks + c;
        const uint32_t end = load(a.piece_end, at);
        uint64_t more = 0;
        for (uint32_t i = load(a.piece, at) + uint32_t(lane()); i < end; i += kWarp)
            more += chosen(float_of_key(load(a.list, row * a.logits.vocab + i)), s);
        PSE_UNROLL
        for (int by = kWarp / 2; by > 0; by /= 2) more += shuffle_xor(more, by);
        if (lane() == 0 && more > 0) store(a.kept, at, load(a.kept, at) + more);
    }
    sync_block();
    const Drawn drawn = draw<kThreads>(a, row, r, load(a.state, row * kState + kMass));
    find_token<kThreads, kGroups>(a, row, s, chosen, drawn);
}

// ---- log-probs of whole rows: fp64 per token, since the definition divides there

template <int kThreads, int kGroups>
PSE_KERNEL(kThreads, kResident / kThreads)
sampling_logprobs(Job a, uint32_t column_chunks) {
    const int64_t row = uint32_t(block()) / column_chunks, chunk = uint32_t(block()) % column_chunks;
    const uint64_t best = load(a.state, row * kState + kBest);
    const double log_mass_of_row = bits_double(load(a.state, row * kState + kSearch));
    const double temperature = double(load(a.knobs, row * a.width));
    const double best_z = double(float_of_key(int32_t(uint32_t(best))));
    for (int64_t group = first_group<kGroups>(chunk); group < first_group<kGroups>(chunk + 1); ++group) {
        const int64_t first = first_token<kThreads>(group);
        Group tokens = {};
        if (best != 0) tokens = combined(a, row, first);
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            const double below = sub_rn(double(tokens.z[i]), best_z);
            const float value = log_probability(below, temperature, log_mass_of_row);
            if (first + i < a.columns)
                store(a.out, row * a.columns + first + i, best != 0 ? value : bits_float(0x7fc00000u));
        }
    }
}

// ---- launchers

// 4096 tokens per block: 32 blocks for a row of 128k, so that one row already spreads over the card. Rows below two
// thousand tokens take blocks of 64 threads: 512 tokens.
constexpr int kWide = 256, kWideGroups = 2, kNarrow = 64, kNarrowGroups = 1;
constexpr int64_t kNarrowVocab = 2048;

bool is_narrow(int64_t vocab, int threads) { return threads == 0 ? vocab <= kNarrowVocab : threads == kNarrow; }

int64_t chunk_size(bool narrow) { return narrow ? kNarrow * kNarrowGroups * kGroup : kWide * kWideGroups * kGroup; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
Global<T> take(int64_t base, int64_t& at, int64_t count) {
    const Global<T> array = global<T>(base + at, count);
    at += ceil_div(count * int64_t(sizeof(T)), 16) * 16;
    return array;
}

// Lays a job's arrays out from the address `base` on; returns their bytes.
int64_t lay_out(Job& job, int64_t base, int64_t rows, int64_t vocab, bool filters) {
    const int64_t chunks = job.chunks;
    int64_t at = 0;
    job.state = take<uint64_t>(base, at, rows * kState);
    job.mass = take<uint64_t>(base, at, rows * chunks);
    job.kept = take<uint64_t>(base, at, rows * chunks);
    job.best = take<int32_t>(base, at, rows * chunks);
    job.tickets = take<uint32_t>(base, at, rows * 2);
    if (!filters) return at;
    job.bin_mass = take<uint64_t>(base, at, rows * kBins);
    job.bin_count = take<uint32_t>(base, at, rows * kBins);
    job.list_end = take<uint32_t>(base, at, rows);
    job.piece = take<uint32_t>(base, at, rows * chunks);
    job.piece_end = take<uint32_t>(base, at, rows * chunks);
    job.list = take<int32_t>(base, at, rows * vocab);
    return at;
}

Job job_of(const Logits& l, const float* knobs, int64_t first_guidance, void* scratch, bool filters, bool narrow) {
    Job job = {};
    job.logits = l;
    job.base_count = (l.rows - 1) * l.base_stride + l.vocab;
    if (l.guides > 0) job.guide_count = (l.guides - 1) * l.guide_stride + (l.rows - 1) * l.guide_row_stride + l.vocab;
    job.chunks = uint32_t(ceil_div(l.vocab, chunk_size(narrow)));
    job.groups = ceil_div(l.vocab, narrow ? kNarrow * kGroup : kWide * kGroup);
    job.width = first_guidance + l.guides;
    job.first_guidance = first_guidance;
    job.knobs = global<const float>(knobs, l.rows * job.width);
    lay_out(job, reinterpret_cast<int64_t>(scratch), l.rows, l.vocab, filters);
    return job;
}

template <int kThreads, int kGroups>
int launch_sample(const Job& job, bool filters, const Target& target) {
    const int64_t blocks = job.logits.rows * int64_t(job.chunks);
    int error = launch("sampling_combine", target, blocks, kThreads, sampling_combine<kThreads, kGroups>, job);
    if (error != 0) return error;
    if (!filters)
        return launch("sampling_weigh", target, blocks, kThreads, sampling_weigh<kThreads, kGroups, false>, job);
    error = launch("sampling_weigh", target, blocks, kThreads, sampling_weigh<kThreads, kGroups, true>, job);
    if (error != 0) return error;
    return launch("sampling_settle", target, blocks, kThreads, sampling_settle<kThreads, kGroups>, job);
}

template <int kThreads, int kGroups>
int launch_logprobs(const Job& job, const Target& target) {
    const int64_t rows = job.logits.rows, blocks = rows * int64_t(job.chunks);
    int error = launch("sampling_combine", target, blocks, kThreads, sampling_combine<kThreads, kGroups>, job);
    if (error != 0) return error;
    error = launch("sampling_weigh", target, blocks, kThreads, sampling_weigh<kThreads, kGroups, false>, job);
    if (error != 0) return error;
    const int64_t column_chunks = ceil_div(job.columns, int64_t(kThreads) * kGroups * kGroup);
    return launch("sampling_logprobs", target, rows * column_chunks, kThreads, sampling_logprobs<kThreads, kGroups>,
                  job, uint32_t(column_chunks));
}

}  // namespace

int64_t sampling_scratch_bytes(int64_t rows, int64_t vocab, bool filters, int threads) {
    Job job = {};
    job.chunks = uint32_t(ceil_div(vocab, chunk_size(is_narrow(vocab, threads))));
    return lay_out(job, 0, rows, vocab, filters);
}

int guided_sample(const SampleArgs& args, int device, void* stream) {
    const bool narrow = is_narrow(args.logits.vocab, args.threads);
    const int64_t rows = args.logits.rows;
    Job job = job_of(args.logits, args.knobs, 3, args.scratch, args.filters, narrow);
    job.same = args.same;
    job.counters = global<const int64_t>(args.counters, rows * 3);
    job.words = global<const uint64_t>(args.words, rows);
    job.row_in_counter = args.row_in_counter;
    job.tokens = global<int64_t>(args.tokens, rows);
    job.logprobs = global<float>(args.logprobs, rows);
    const Target target = {device, stream};
    return narrow ? launch_sample<kNarrow, kNarrowGroups>(job, args.filters, target)
                  : launch_sample<kWide, kWideGroups>(job, args.filters, target);
}

int guided_logprobs(const LogprobArgs& args, int device, void* stream) {
    const bool narrow = is_narrow(args.logits.vocab, args.threads);
    Job job = job_of(args.logits, args.knobs, 1, args.scratch, false, narrow);
    job.same.top_p = 1.0f;  // the rest is 0: no filter, no draw
    job.out = global<float>(args.out, args.logits.rows * args.columns);
    job.columns = args.columns;
    const Target target = {device, stream};
    return narrow ? launch_logprobs<kNarrow, kNarrowGroups>(job, target)
                  : launch_logprobs<kWide, kWideGroups>(job, target);
}

}  // namespace cuda
}  // namespace pse
