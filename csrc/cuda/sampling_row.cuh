// What the two forms of guided sampling share: a row's parameters, its z, its histogram, where its filters cut, and the
// token at a threshold. csrc/cuda/sampling.cu spreads a row's chunks over launches, sampling_cluster.cu gives a row to
// a cluster of blocks; both call these, so both draw the same tokens.
#pragma once
#include "core/guided.h"
#include "core/philox.h"
#include "core/sampling_weight.h"
#include "cuda/sampling.h"
#include "cuda/simt.cuh"

namespace pse {
namespace cuda {
namespace sampling {

using namespace simt;
using namespace PSE_ISA;

constexpr int kGroup = 8;  // neighbouring tokens of a thread: one 16-byte load of a 16-bit dtype

// Blocks per multiprocessor for which kernels that do more than read may take registers: 64 each, 80 in small blocks.
// Not told, ptxas aims at more and spills in the code of the draw, which decides nothing about bandwidth.
template <int kThreads>
constexpr int kResident = kThreads == 64 ? 12 : 1024 / kThreads;

// Bins of 1/16 octave over exponents down to -40.5. Below, every weight is 0, so no filter changes the draw there.
constexpr int kBins = 648;
PSE_HD int bin_of(float exponent) { return int32_t(mul_rn(exponent, -16.0f)); }

// Sums of weights in 32-bit shared atomics (64-bit ones are loops of compare-and-swap): the low 20 bits and the rest.
// 4095 weights of up to 2^40 fit both.
constexpr int kLowBits = 20;
constexpr uint64_t kBestWeight = uint64_t(1) << kFractionBits;

// A parameter per row, or null.
template <class T>
struct Column {
    Global<const T> at;
    int64_t stride;
    PSE_METHOD T of(int64_t row, T same) const { return at == nullptr ? same : load(at, row * stride); }
};

// Who asks for what: the arguments of a kernel.
struct Request {
    Logits logits;
    int64_t base_count, guide_count;  // elements from the first to the last that may be read
    int guides;
    bool usual;  // one guide, all of 16 bits, every row aligned to 16 bytes
    int groups;  // reads of a whole block, per row
    Knobs same;
    Column<float> temperature, top_p, min_p, guidance;
    Column<int64_t> top_k, seed, offset;
    Global<const uint64_t> words;
    bool row_in_counter;
    Global<int64_t> tokens;  // null for guided_logprobs
    Global<float> logprobs;  // [rows] or null
};

// A row has several blocks, next to each other.
PSE_DEVICE int64_t row_of(uint32_t blocks_of_row) { return uint32_t(block()) / blocks_of_row; }
PSE_DEVICE int part_of(uint32_t blocks_of_row) { return int(uint32_t(block()) % blocks_of_row); }

PSE_HD bool is_16_bit(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

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

// Joins a value of every lane; all lanes get the result.
template <class T, class Join>
PSE_DEVICE T warp_reduce(T x, Join join PSE_CALLER) {
    PSE_UNROLL
    for (int by = kWarp / 2; by > 0; by /= 2) x = join(x, shuffle_xor(x, by));
    return x;
}

// The sum over this lane and those below.
template <class T>
PSE_DEVICE T warp_inclusive(T x PSE_CALLER) {
    PSE_UNROLL
    for (int by = 1; by < kWarp; by *= 2) {
        const T lower = shuffle_up(x, by);
        x += lane() >= by ? lower : T(0);
    }
    return x;
}

// Joins a value of every thread; all threads get the result.
template <int kThreads, class T, class Join>
PSE_DEVICE T block_reduce(T x, Join join PSE_CALLER) {
    constexpr int kWarps = kThreads / kWarp;
    PSE_SHARED(T, parts, kWarps);
    x = warp_reduce(x, join);
    sync_block();  // parts may still be read by an earlier call
    if (lane() == 0) store(parts, warp(), x);
    sync_block();
    T all = load(parts, lane() % kWarps);  // a part per lane: all of them in each thread would cost registers
    PSE_UNROLL
    for (int by = kWarps / 2; by > 0; by /= 2) all = join(all, shuffle_xor(all, by));
    return all;
}

template <class T>
struct Prefix {
    T before, total;  // the sum over lower threads; over all
};

template <int kThreads, class T>
PSE_DEVICE Prefix<T> block_prefix(T own PSE_CALLER) {
    constexpr int kWarps = kThreads / kWarp;
    PSE_SHARED(T, sums, kWarps);
    const T inclusive = warp_inclusive(own);
    sync_block();  // sums may still be read by an earlier call
    if (lane() == kWarp - 1) store(sums, warp(), inclusive);
    sync_block();
    const T sum = load(sums, lane() % kWarps), up_to = warp_inclusive(sum);
    return {shuffle(up_to - sum, warp()) + inclusive - own, shuffle(up_to, kWarps - 1)};
}

template <class T>
struct Reached {
    int index;  // of the first value at which the running sum reaches the target; the count of values if none does
    T before;   // the sum of those before it
};

// value(i) for i in [0, n); target >= 1.
template <int kThreads, class T, class Value>
PSE_DEVICE Reached<T> first_reaching(int n, T target, const Value& value PSE_CALLER) {
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

// The sum of value(i) over [0, n).
template <int kThreads, class Value>
PSE_DEVICE uint64_t sum_of(int n, const Value& value PSE_CALLER) {
    uint64_t own = 0;
    for (int i = thread(); i < n; i += kThreads) own += value(i);
    return block_reduce<kThreads>(own, Sum());
}

// ---- a row's parameters

struct Row {
    float temperature, top_p;
    uint32_t top_k;  // where by_rank
    bool good;       // but for its guidance and its logits: see Best
    bool greedy, by_rank, by_mass;
    float c;         // log2(e) / temperature
    uint64_t floor;  // min-p: the least weight
};

PSE_DEVICE float guidance_of(const Request& a, int64_t row, int guide) {
    if (a.guidance.at == nullptr) return a.same.guidance;
    return load(a.guidance.at, row * a.guidance.stride + guide);
}

PSE_DEVICE float temperature_of(const Request& a, int64_t row) { return a.temperature.of(row, a.same.temperature); }
// These two are read again for the draw: until then they would take four registers.
PSE_DEVICE int64_t seed_of(const Request& a, int64_t row) { return a.seed.of(row, a.same.seed); }
PSE_DEVICE int64_t offset_of(const Request& a, int64_t row) { return a.offset.of(row, a.same.offset); }

PSE_DEVICE Row read_row(const Request& a, int64_t row) {
    Row r = {};
    r.temperature = temperature_of(a, row);
    r.top_p = a.top_p.of(row, a.same.top_p);
    const float min_p = a.min_p.of(row, a.same.min_p);
    const int64_t top_k = a.top_k.of(row, a.same.top_k);
    r.good = valid_parameters(r.temperature, r.top_p, min_p, top_k, seed_of(a, row), offset_of(a, row));
    r.greedy = r.temperature == 0.0f;
    if (a.tokens == nullptr) r.good = r.good && !r.greedy;
    r.top_k = uint32_t(top_k);
    r.by_rank = !r.greedy && top_k > 0 && top_k < a.logits.vocab;
    r.by_mass = !r.greedy && r.top_p < 1.0f;
    r.c = inverse_temperature(r.greedy ? 1.0f : r.temperature);
    if (!r.greedy) r.floor = min_p < 1.0f ? fixed_point(min_p, kFractionBits) : kBestWeight;
    return r;
}

PSE_DEVICE uint64_t word_of(const Request& a, int64_t row) {
    if (a.words != nullptr) return load(a.words, row);
    return philox_u64(uint64_t(seed_of(a, row)), uint64_t(offset_of(a, row)), a.row_in_counter ? uint64_t(row) : 0);
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

struct Group {
    float z[kGroup];
};

// NaN is passed over.
PSE_DEVICE float best_of(const Group& tokens) {
    float best = kMinusInfinity;
    PSE_UNROLL
    for (int i = 0; i < kGroup; ++i) best = max_number(tokens.z[i], best);
    return best;
}

PSE_HD int32_t key_of_token(float z) { return key_of(add_rn(z, 0.0f)); }  // -0 and +0 are one key

// A block reads kThreads * kGroup neighbouring tokens at once, a thread kGroup of them.
template <int kThreads>
PSE_DEVICE int64_t first_token(int group) {
    return (int64_t(group) * kThreads + thread()) * kGroup;
}

// Logits as they are in memory, those of 16 bits two to a word: nothing waits for their load yet.
struct Packed {
    uint32_t word[kGroup];

    PSE_METHOD void set(int i, float x) { word[i] = float_bits(x); }
    PSE_METHOD void set(int i, double x) { word[i] = float_bits(float(x)); }
    PSE_METHOD void set(int i, uint16_t x) { word[i / 2] = i % 2 == 0 ? x : word[i / 2] | uint32_t(x) << 16; }
};

// The first `left` are there; the rest is `beyond`.
template <class T>
PSE_DEVICE Packed read_as(const void* data, int64_t count, int64_t at, int64_t left, T beyond) {
    constexpr int kVector = 16 / int(sizeof(T));
    const Global<const T> p = global<const T>(data, count);
    Packed packed;
    if (left >= kGroup && is_aligned(p, at, 16)) {
        PSE_UNROLL
        for (int v = 0; v < kGroup; v += kVector) {
            const auto vector = load_vector<kVector>(p, at + v);
            PSE_UNROLL
            for (int i = 0; i < kVector; ++i) packed.set(v + i, vector.at[i]);
        }
    } else {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) packed.set(i, i < left ? load(p, at + i) : beyond);
    }
    return packed;
}

// The dtype is a branch per read, not a template: 16 pairs of dtypes are one kernel.
PSE_DEVICE Packed read_logits(const void* data, DType dtype, int64_t count, int64_t at, int64_t left) {
    if (is_16_bit(dtype))
        return read_as<uint16_t>(data, count, at, left, dtype == DType::bf16 ? 0xff80u : 0xfc00u);  // -inf
    if (dtype == DType::f32) return read_as<float>(data, count, at, left, kMinusInfinity);
    return read_as<double>(data, count, at, left, double(kMinusInfinity));
}
PSE_DEVICE Group unpack(const Packed& packed, DType dtype) {
    Group group;
    if (dtype == DType::bf16) {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i)
            group.z[i] = bits_float(i % 2 == 0 ? packed.word[i / 2] << 16 : packed.word[i / 2] & 0xffff0000u);
    } else if (dtype == DType::f16) {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) group.z[i] = f16_to_float(uint16_t(packed.word[i / 2] >> (i % 2 * 16)));
    } else {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) group.z[i] = bits_float(packed.word[i]);
    }
    return group;
}

// z from token `first` on by guided(); -inf beyond the vocabulary.
PSE_DEVICE Group exact_group(const Request& a, int64_t row, int64_t first) {
    const Logits& l = a.logits;
    const int64_t left = l.vocab - first;
    Packed z = read_logits(l.base, l.base_dtype, a.base_count, row * l.base_stride + first, left);
    DType dtype = l.base_dtype;
    for (int n = 0; n < a.guides; ++n) {
        const float w = guidance_of(a, row, n);
        if (w == 0.0f) continue;  // not read: 0 * -inf would be NaN
        const int64_t at = n * l.guide_stride + row * l.guide_row_stride + first;
        const Packed packed = read_logits(l.guide, l.guide_dtype, a.guide_count, at, left);
        const Group base = unpack(z, dtype);  // not before: base and guide are on their way together
        const Group guide = unpack(packed, l.guide_dtype);
        if (w > 0.0f) {
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) z.set(i, guided_toward(base.z[i], guide.z[i], w));
        } else {
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) z.set(i, guided_away(base.z[i], guide.z[i], w));
        }
        dtype = DType::f32;
    }
    return unpack(z, dtype);
}

// The guidance of usual rows, or 0: those are read in half of the instructions.
PSE_DEVICE float usual_guidance(const Request& a, int64_t row) { return a.usual ? guidance_of(a, row, 0) : 0.0f; }

PSE_DEVICE Packed read_16_bit(const void* data, int64_t count, int64_t at) {
    const auto vector = load_vector<kGroup>(global<const uint16_t>(data, count), at);
    Packed packed;
    __builtin_memcpy(packed.word, vector.at, sizeof vector.at);
    return packed;
}

// z of a usual row by plain arithmetic, kGroup tokens of the vocabulary. It is guided()'s unless that refuses the row
// or masks the token: there it may be NaN in place of -inf, since -inf in the base and +inf in a guide add up to it.
PSE_DEVICE Group plain_group(const Request& a, int64_t row, int64_t first, float w) {
    const Logits& l = a.logits;
    const Packed base = read_16_bit(l.base, a.base_count, row * l.base_stride + first);
    const Packed guide = read_16_bit(l.guide, a.guide_count, row * l.guide_row_stride + first);
    Group z = unpack(base, l.base_dtype);
    const Group g = unpack(guide, l.guide_dtype);
    PSE_UNROLL
    for (int i = 0; i < kGroup; ++i) z.z[i] = add_rn(z.z[i], mul_rn(w, g.z[i]));
    return z;
}

// z in a row without a bad value; w is its usual_guidance(). NaN stands for -inf: it weighs nothing (exponent_of) and
// is no maximum.
PSE_DEVICE Group read_group(const Request& a, int64_t row, int64_t first, float w) {
    return w != 0.0f && a.logits.vocab - first >= kGroup ? plain_group(a, row, first, w) : exact_group(a, row, first);
}

// The best of a thread's tokens, of which none may be bad, nor the row's guidance.
struct Best {
    float z = kMinusInfinity;
    bool bad = false;
    float w;  // usual_guidance(), but below 0: there plain arithmetic hides a guide's infinity, which guided() refuses

    PSE_METHOD Best(const Request& a, int64_t row) {
        w = max_number(usual_guidance(a, row), 0.0f);
        for (int n = 0; n < a.guides; ++n) bad = bad || !finite_number(guidance_of(a, row, n));
    }
    // Takes a group, and returns its z, where NaN may stand for -inf.
    PSE_METHOD Group take(const Request& a, int64_t row, int64_t first) {
        Group tokens;
        float sum = 0.0f;  // NaN if one is, or if infinities meet
        const bool quick = w != 0.0f && a.logits.vocab - first >= kGroup;
        if (quick) {
            tokens = plain_group(a, row, first, w);
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) sum = add_rn(sum, tokens.z[i]);
        }
        if (!quick || is_nan(sum)) {
            tokens = exact_group(a, row, first);
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) bad = bad || is_nan(tokens.z[i]);
        }
        z = max_number(best_of(tokens), z);
        return tokens;
    }
    // Above infinity where one is bad.
    PSE_METHOD int32_t key() const { return bad ? INT32_MAX : key_of_token(z); }
};

// ---- a block's histogram over bins

// Counts and masses of up to 4096 tokens: more would overflow `high`. Tokens of the best weight are counted apart,
// since 4096 of those do as well.
template <int kThreads>
struct Histogram {
    Shared<uint32_t> counts, low, high, full;
    bool count, weigh;  // what is wanted

    PSE_METHOD void clear_counts() const {
        for (int i = thread(); i < kBins; i += kThreads) store(counts, i, 0u);
    }
    PSE_METHOD void clear_masses() const {
        for (int i = thread(); i < kBins; i += kThreads) {
            store(low, i, 0u);
            store(high, i, 0u);
        }
        if (thread() == 0) store(full, 0, 0u);
    }
    PSE_METHOD void add(float exponent, uint64_t weight) const {
        const int bin = bin_of(exponent);
        if (bin >= kBins) return;
        if (count) atomic_add(counts, bin, 1u);
        if (!weigh) return;
        const uint32_t upper = uint32_t(weight >> kLowBits);
        if (upper == uint32_t(kBestWeight >> kLowBits)) {
            atomic_add(full, 0, 1u);
        } else {
            atomic_add(low, bin, uint32_t(weight) & ((1u << kLowBits) - 1));
            atomic_add(high, bin, upper);
        }
    }
    // A token of the best weight is in bin 0.
    PSE_METHOD uint64_t mass(int bin) const {
        const uint64_t others = (uint64_t(load(high, bin)) << kLowBits) + load(low, bin);
        return others + (bin == 0 ? uint64_t(load(full, 0)) << kFractionBits : 0);
    }
};

struct Masses {
    uint64_t all, kept;  // kept by min-p
};

// What a thread's tokens weigh.
template <int kThreads>
struct Weighing {
    const Scale& s;
    uint64_t floor;  // min-p: the least weight
    const Histogram<kThreads>& histogram;
    bool counted;  // in the histogram
    uint64_t all = 0, kept = 0;

    // Few groups have a token that min-p keeps. Half: weights rise with z, but for the polynomial's rounding.
    PSE_METHOD void take(const Group& tokens) {
        if (floor > 0 && s.weight(best_of(tokens)) >= floor / 2)
            add<true>(tokens);
        else
            add<false>(tokens);
    }
    template <bool kKeep>
    PSE_METHOD void add(const Group& tokens) {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            const float exponent = s.exponent(tokens.z[i]);
            const uint64_t weight = weight_of_exponent(exponent);
            all += weight;
            if (kKeep && weight >= floor) kept += weight;
            if (counted) histogram.add(exponent, weight);
        }
    }
    // Of the block.
    PSE_METHOD Masses masses() const {
        const uint64_t sum = block_reduce<kThreads>(all, Sum());
        return {sum, floor > 0 ? block_reduce<kThreads>(kept, Sum()) : sum};
    }
};

// ---- where the filters cut

// The bins in which the thresholds of top-k and top-p lie.
struct Search {
    int top_k, low, high;  // top-k's bin or kBins, the range of top-p's
    uint64_t rank;         // of the top-k threshold within its bin
    uint64_t above_top_k;  // mass of the bins above top-k's
    uint64_t above_top_p;  // mass of the bins above top-p's first

    PSE_HD bool keeps_all() const { return low == kBins; }
    PSE_HD bool holds(int bin) const { return (bin >= low && bin <= high) || bin == top_k; }
    PSE_HD int last() const { return top_k < kBins ? top_k : high; }  // top-p's bins are not below top-k's
};

// top-k's bin is exact. top-p's target depends on what top-k leaves of its own bin, so its bin is known up to a range,
// nearly always of one or two. mass() is the row's, before the filters.
template <int kThreads, class Mass, class Count, class BinMass>
PSE_DEVICE Search find_bins(const Row& r, const Mass& mass, const Count& bin_count, const BinMass& bin_mass) {
    Search found = {kBins, kBins, kBins, 0, 0, 0};  // all tokens that weigh anything are among the k best
    uint64_t least = 0, most = 0;                   // what top-k may leave
    if (r.by_rank) {
        const auto reached = first_reaching<kThreads>(kBins, r.top_k, bin_count);
        found.top_k = reached.index;
        found.rank = uint64_t(r.top_k) - reached.before;
        if (r.by_mass && found.top_k < kBins) {
            found.above_top_k = least = sum_of<kThreads>(found.top_k, bin_mass);
            most = least + bin_mass(found.top_k);
        }
    }
    found.low = found.high = found.top_k;
    if (r.by_mass) {
        if (found.top_k == kBins) least = most = mass();
        const uint64_t share = fixed_point(r.top_p, 64);
        const auto reached = first_reaching<kThreads>(kBins, Larger()(mulhi64(share, least), uint64_t(1)), bin_mass);
        found.low = found.high = reached.index;
        found.above_top_p = reached.before;
        if (most > least)
            found.high = first_reaching<kThreads>(kBins, Larger()(mulhi64(share, most), uint64_t(1)), bin_mass).index;
    }
    return found;
}

// A digit of a key has a value per thread.
template <int kThreads>
PSE_HD constexpr int digit_bits() {
    return kThreads == 512 ? 9 : kThreads == 256 ? 8 : 6;
}

// The largest key of a bin such that its keys with that key or a larger one measure at least `target` >= 1. Keys are
// searched as distances from the bin's best, a digit a pass from the first digit that differs on; none where all keys
// are equal. `nearest` and `farthest` are the bin's distances from the row's best. measure(shift, digits) is that of
// the keys whose distance begins with `digits` and goes on with this thread's digit at `shift`.
template <int kThreads, class Measure>
PSE_DEVICE int32_t search_key(int32_t best_key, uint32_t nearest, uint32_t farthest, uint64_t target,
                              const Measure& measure PSE_CALLER) {
    constexpr int kDigitBits = digit_bits<kThreads>();
    static_assert(1 << kDigitBits == kThreads, "blocks are of 64, 256 or 512 threads");
    PSE_SHARED(uint32_t, chosen, 1);
    PSE_SHARED(uint64_t, passed, 1);
    int shift = 0;  // of the digit before the first
    while (shift < 32 && ((farthest - nearest) >> shift) != 0) shift += kDigitBits;
    uint64_t digits = 0;
    while (shift > 0) {
        shift -= kDigitBits;
        const uint64_t own = measure(shift, digits);
        const Prefix<uint64_t> prefix = block_prefix<kThreads>(own);
        if (prefix.before < target && target <= prefix.before + own) {
            store(chosen, 0, uint32_t(thread()));
            store(passed, 0, prefix.before);
        }
        sync_block();
        digits = (digits << kDigitBits) | load(chosen, 0);
        target -= load(passed, 0);
    }
    return int32_t(uint32_t(best_key) - nearest - uint32_t(digits));
}

// The key from which on tokens are kept by top-k and top-p, where they do not keep all. keys.select<by mass>(bin,
// target) is a search_key() of that bin, keys.mass(bin, key) what its keys from `key` on weigh.
template <int kThreads, class Mass, class Keys, class BinMass>
PSE_DEVICE int32_t settle_key(const Row& r, const Search& search, const Mass& mass, Keys& keys,
                              const BinMass& bin_mass) {
    int32_t key = kKeyOfMinusInfinity;
    if (search.top_k < kBins) key = keys.template select<false>(search.top_k, search.rank);
    if (!r.by_mass) return key;
    const uint64_t available = search.top_k < kBins ? search.above_top_k + keys.mass(search.top_k, key) : mass();
    const uint64_t share = mulhi64(fixed_point(r.top_p, 64), available);
    const uint64_t target = Larger()(share, uint64_t(1)) - search.above_top_p;
    const auto reached =
        first_reaching<kThreads>(search.high - search.low + 1, target, [&](int i) { return bin_mass(search.low + i); });
    return keys.template select<true>(search.low + reached.index, target - reached.before);
}

// ---- the draw

struct Kept {
    int32_t key;      // at least this key
    uint64_t weight;  // and at least this weight
    PSE_HD uint64_t operator()(float z, const Scale& s) const {
        if (key_of_token(z) < key) return 0;  // most of a filtered row
        const uint64_t w = s.weight(z);
        return w >= weight ? w : 0;
    }
};

// Stores the first token of groups [first, end) at which the running sum of kept weights exceeds `threshold`. mass() is
// the row's, before the filters; z_of(group) gives this thread's tokens of a group.
template <int kThreads, class Mass, class Z>
PSE_DEVICE void find_token(const Request& a, int64_t row, const Scale& s, const Kept& kept, uint64_t threshold,
                           const Mass& mass, int first, int end, const Z& z_of) {
    for (int group = first; group < end; ++group) {
        const Group tokens = z_of(group);
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
                const double below = sub_rn(double(add_rn(z, 0.0f)), double(s.best));  // -0 would give a log-prob of -0
                const double temperature = r.greedy ? 1.0 : double(r.temperature);
                store(a.logprobs, row, log_probability(below, temperature, log_mass(mass())));
            }
        }
        return;
    }
}

// ---- launchers

constexpr int kNarrow = 64;  // threads of a block where rows are short
constexpr int64_t kNarrowVocab = 2048;

inline bool is_narrow(int64_t vocab, int threads) { return threads == 0 ? vocab <= kNarrowVocab : threads == kNarrow; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
Column<T> column_of(const PerRow<T>& knob, int64_t rows, int64_t beyond = 1) {
    return {global<const T>(knob.at, (rows - 1) * knob.stride + beyond), knob.stride};
}

inline Request request_of(const Logits& l, const Knobs& same, const KnobsPerRow& own, int threads) {
    Request a = {};
    a.logits = l;
    a.base_count = (l.rows - 1) * l.base_stride + l.vocab;
    if (l.guides > 0) a.guide_count = (l.guides - 1) * l.guide_stride + (l.rows - 1) * l.guide_row_stride + l.vocab;
    a.guides = int(l.guides);
    const auto aligned = [&](const void* data, int64_t row_stride) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (row_stride % kGroup == 0 || l.rows == 1);
    };
    a.usual = a.guides == 1 && is_16_bit(l.base_dtype) && is_16_bit(l.guide_dtype) && aligned(l.base, l.base_stride) &&
              aligned(l.guide, l.guide_row_stride);
    a.groups = int(ceil_div(l.vocab, threads * kGroup));
    a.same = same;
    a.temperature = column_of(own.temperature, l.rows);
    a.top_p = column_of(own.top_p, l.rows);
    a.min_p = column_of(own.min_p, l.rows);
    a.guidance = column_of(own.guidance, l.rows, l.guides);
    a.top_k = column_of(own.top_k, l.rows);
    a.seed = column_of(own.seed, l.rows);
    a.offset = column_of(own.offset, l.rows);
    return a;
}

inline Request request_of(const SampleArgs& args, int threads) {
    const int64_t rows = args.logits.rows;
    Request a = request_of(args.logits, args.same, args.rows, threads);
    a.words = global<const uint64_t>(args.words, rows);
    a.row_in_counter = args.row_in_counter;
    a.tokens = global<int64_t>(args.tokens, rows);
    a.logprobs = global<float>(args.logprobs, rows);
    return a;
}

}  // namespace sampling
}  // namespace cuda
}  // namespace pse
