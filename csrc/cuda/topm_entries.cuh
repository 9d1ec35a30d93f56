// Entries of a list of tensors, eight neighbours per thread: where they are, their keys, their edit.
//
// Table  One row of words per tensor and one per group (the entries that compete for the same m), in device memory.
// Chunk  A task: up to `chunk` entries of one tensor. A tensor's chunks are numbered on from those before it.
// Wide   Loads and stores are of 16 bytes where every array of the tensor is aligned to that, else element by element;
//        a warp still reads neighbouring addresses.
#pragma once
#include "core/dtype.h"
#include "core/magnitude_key.h"
#include "cuda/simt.cuh"

namespace pse {
namespace cuda {

using namespace simt;
using baseline::add_rn;
using baseline::bf16_to_float;
using baseline::bits_double;
using baseline::bits_float;
using baseline::Bound;
using baseline::double_bits;
using baseline::entry_key;
using baseline::everything;
using baseline::f16_to_float;
using baseline::float_bits;
using baseline::float_to_bf16;
using baseline::float_to_f16;
using baseline::floats_to_bf16;
using baseline::floats_to_f16;
using baseline::fma_rn;
using baseline::key_score;
using baseline::KeyTraits;
using baseline::mul_rn;
using baseline::nothing;
using baseline::sub_rn;

constexpr int kThreads = 256;  // 8 warps share a tensor search and a stage of candidates
constexpr int kWarps = kThreads / kWarp;
constexpr int kAnyOccupancy = 1;  // blocks per processor that are asked for: left to itself, ptxas spills to fit more
constexpr int kPer = 8;           // entries per thread and step: 16 bytes of bf16
constexpr int kStep = kThreads * kPer;  // entries per block and step

enum TensorWord { kParams, kBase, kTuned, kImportance, kTags, kNumel, kFirst, kFirstChunk, kTensorWords };

// kTags: dtype tags of params, base, tuned and importance in 4 bits each (15: no importance), then these.
constexpr int64_t kNoImportance = 15;
constexpr int64_t kAligned = 1 << 16;   // every array of the tensor starts at a multiple of 16 bytes
constexpr int64_t kInDouble = 1 << 17;  // computed in fp64

struct TensorRow {
    int64_t params, base, tuned, importance, tags, numel, first, first_chunk;

    PSE_HD int tag(int which) const { return int(tags >> (4 * which)) & 15; }
    PSE_HD bool aligned() const { return (tags & kAligned) != 0; }
    PSE_HD bool in_double() const { return (tags & kInDouble) != 0; }
};

PSE_DEVICE TensorRow tensor_row(Global<const int64_t> table, int64_t i) {
    const Global<const int64_t> row = table + i * kTensorWords;
    const int64_t params = load(row, kParams), base = load(row, kBase), tuned = load(row, kTuned);
    const int64_t importance = load(row, kImportance), tags = load(row, kTags), numel = load(row, kNumel);
    const int64_t first = load(row, kFirst), first_chunk = load(row, kFirstChunk);
    return {params, base, tuned, importance, tags, numel, first, first_chunk};
}

// The last of `count` rows whose word is at or below the target; rows without entries come before the one that has it.
PSE_DEVICE int64_t find_row(Global<const int64_t> table, int words, int word, int64_t count, int64_t target) {
    int64_t low = 0;
    while (count > 1) {
        const int64_t half = count / 2;
        const int64_t at = load(table, (low + half) * words + word);
        low = at <= target ? low + half : low;
        count -= half;
    }
    return low;
}

// ---- elements

template <class T>
struct Eight {
    T at[kPer];
};

// The same as loaded, in words: the compiler would keep every 16-bit element in a register of its own.
template <class T>
struct Packed {
    static constexpr int kEach = sizeof(T) == 2 ? 2 : 1;  // elements of a word
    uint32_t words[kPer * sizeof(T) / 4];

    PSE_METHOD T at(int j) const {
        T x;
        if constexpr (kEach == 2) {
            const uint16_t half = uint16_t(words[j / 2] >> (j % 2 * 16));
            __builtin_memcpy(&x, &half, sizeof(T));
        } else {
            __builtin_memcpy(&x, &words[j * sizeof(T) / 4], sizeof(T));
        }
        return x;
    }
};

PSE_HD void widen(float x, float* out) { *out = x; }
PSE_HD void widen(bf16_t x, float* out) { *out = bf16_to_float(x.bits); }
PSE_HD void widen(f16_t x, float* out) { *out = f16_to_float(x.bits); }
PSE_HD void widen(double x, double* out) { *out = x; }
PSE_HD void widen(float x, double* out) { *out = double(x); }
PSE_HD void widen(bf16_t x, double* out) { *out = double(bf16_to_float(x.bits)); }
PSE_HD void widen(f16_t x, double* out) { *out = double(f16_to_float(x.bits)); }

PSE_HD void round_to(float x, float* out) { *out = x; }
PSE_HD void round_to(float x, bf16_t* out) { out->bits = float_to_bf16(x); }
PSE_HD void round_to(float x, f16_t* out) { out->bits = float_to_f16(x); }
PSE_HD void round_to(double x, double* out) { *out = x; }
PSE_HD void round_to(double x, float* out) { *out = float(x); }
PSE_HD void round_to(double x, bf16_t* out) { out->bits = float_to_bf16(float(x)); }  // by way of fp32, as torch
PSE_HD void round_to(double x, f16_t* out) { out->bits = float_to_f16(float(x)); }

// The bits as the undo record keeps them: sign-extended.
PSE_HD int64_t bits_of(float x) { return int32_t(float_bits(x)); }
PSE_HD int64_t bits_of(double x) { return int64_t(double_bits(x)); }
PSE_HD int64_t bits_of(bf16_t x) { return int16_t(x.bits); }
PSE_HD int64_t bits_of(f16_t x) { return int16_t(x.bits); }

// How a step of a chunk is read: whole (every thread has eight entries, and every array is aligned to 16 bytes) or
// entry by entry, of which a thread has `mine`. Code is made for each, so that the first has no branches.
struct Whole {
    static constexpr bool value = true;
};
struct Ragged {
    static constexpr bool value = false;
};

// The first n of eight neighbours from i on.
template <class Step, class T>
PSE_DEVICE void load_packed(Step, Global<const T> p, int64_t i, int n, Packed<T>* out) {
    constexpr int kVector = Step::value ? 16 / int(sizeof(T)) : kPer;
    PSE_UNROLL
    for (int v = 0; v < kPer; v += kVector) {
        Vector<T, kVector> part = {};
        if constexpr (Step::value) {
            part = load_vector<kVector>(p, i + v);
        } else {
            PSE_UNROLL
            for (int j = 0; j < kPer; ++j)
                if (j < n) part.at[j] = load(p, i + j);
        }
        __builtin_memcpy(&out->words[v * sizeof(T) / 4], &part, sizeof part);
    }
}
template <class T>
PSE_DEVICE void store_packed(Global<T> p, int64_t i, const Packed<T>& x) {
    constexpr int kVector = 16 / int(sizeof(T));
    PSE_UNROLL
    for (int v = 0; v < kPer; v += kVector) {
        Vector<T, kVector> part;
        __builtin_memcpy(&part, &x.words[v * sizeof(T) / 4], sizeof part);
        store_vector<kVector>(p, i + v, part);
    }
}

template <class T, class Step, class Real>
PSE_DEVICE void load_as(Step how, int64_t address, int64_t numel, int64_t i, int n, Eight<Real>* out) {
    Packed<T> raw;
    load_packed(how, simt::global<const T>(address, numel), i, n, &raw);
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) widen(raw.at(j), &out->at[j]);
}

template <class Step, class Real>
PSE_DEVICE void load_any(Step how, int tag, int64_t address, int64_t numel, int64_t i, int n, Eight<Real>* out) {
    if constexpr (sizeof(Real) == 8) {
        if (tag == int(DType::f64)) return load_as<double>(how, address, numel, i, n, out);
    }
    if (tag == int(DType::f32)) return load_as<float>(how, address, numel, i, n, out);
    if (tag == int(DType::f16)) return load_as<f16_t>(how, address, numel, i, n, out);
    load_as<bf16_t>(how, address, numel, i, n, out);
}

// ---- keys. A source says how a tensor's entries are read; its Raw is what is in flight before it is computed with.

// Params, base and tuned are all T and there is no importance: what a model's edit nearly always is. No key is made:
// |delta| is compared as the float it is, on the pipe for additions, since that for comparisons has half its rate.
template <class T>
struct Same {
    using Real = float;
    using Key = uint32_t;
    static constexpr bool kAhead = true;  // the next step's loads are in flight while one is computed
    struct Raw {
        Packed<T> base, tuned;
    };
    struct Entries {
        Eight<float> delta;
        uint32_t barred;  // bit j: entry j may not be selected, or is not there
    };
};

// Any dtypes, told apart at run time (the branches are uniform in a block).
template <class R, class K>
struct Mixed {
    using Real = R;
    using Key = K;
    static constexpr bool kAhead = sizeof(K) == 4;  // with 64-bit keys it would spill
    struct Raw {
        Eight<R> base, tuned;
    };
    struct Entries {
        Eight<R> delta;
        Eight<K> key;  // 0: may not be selected, or is not there
    };
};

template <class Step, class T>
PSE_DEVICE void load_raw(Step how, Same<T>, const TensorRow& t, int64_t i, int n, typename Same<T>::Raw* raw) {
    load_packed(how, simt::streamed<const T>(t.base, t.numel), i, n, &raw->base);
    load_packed(how, simt::streamed<const T>(t.tuned, t.numel), i, n, &raw->tuned);
}
template <class Step, class Real, class Key>
PSE_DEVICE void load_raw(Step how, Mixed<Real, Key>, const TensorRow& t, int64_t i, int n,
                         typename Mixed<Real, Key>::Raw* raw) {
    load_any(how, t.tag(1), t.base, t.numel, i, n, &raw->base);
    load_any(how, t.tag(2), t.tuned, t.numel, i, n, &raw->tuned);
}

// The first n of eight entries; the others are as if they were not eligible. Returns how many may not be selected.
template <class Step, class T>
PSE_DEVICE int entries_of(Step, Same<T>, const TensorRow&, int64_t, int n, const typename Same<T>::Raw& raw,
                          typename Same<T>::Entries* out) {
    float sum = 0.0f;
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) {
        float base, tuned;
        widen(raw.base.at(j), &base);
        widen(raw.tuned.at(j), &tuned);
        out->delta.at[j] = sub_rn(tuned, base);
        sum = fma_rn(out->delta.at[j], 0.0f, sum);
    }
    out->barred = Step::value ? 0u : ~((1u << n) - 1u);
    if (sum == 0.0f) return 0;
    uint32_t bad = 0;  // infinite or NaN
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) bad |= uint32_t(entry_key<float, uint32_t>(out->delta.at[j]) == 0 ? 1 : 0) << j;
    bad &= ~out->barred;
    out->barred |= bad;
    return count_bits(bad);
}
template <class Step, class Real, class Key>
PSE_DEVICE int entries_of(Step how, Mixed<Real, Key>, const TensorRow& t, int64_t i, int n,
                          const typename Mixed<Real, Key>::Raw& raw, typename Mixed<Real, Key>::Entries* out) {
    Eight<Real> weight = {};
    const bool weighted = t.tag(3) != kNoImportance;
    if (weighted) load_any(how, t.tag(3), t.importance, t.numel, i, n, &weight);
    int excluded = 0;
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) {
        const Real delta = sub_rn(raw.tuned.at[j], raw.base.at[j]);
        const Key key = weighted ? entry_key<Real, Key>(delta, weight.at[j]) : entry_key<Real, Key>(delta);
        excluded += (Step::value || j < n) && key == 0 ? 1 : 0;
        out->delta.at[j] = delta;
        out->key.at[j] = Step::value || j < n ? key : Key(0);
    }
    return excluded;
}

// Calls body(step, at, mine, excluded, entries) for every step of the n entries of t from `local` on: `at` is this
// thread's first entry of the chunk, `mine` how many it has. A whole block calls, and all of it comes to every step.
template <class Source, class Body>
PSE_DEVICE void for_each_step(Source source, const TensorRow& t, int64_t local, int n, const Body& body) {
    using Raw = typename Source::Raw;
    typename Source::Entries entries;
    const int whole = t.aligned() ? n / kStep * kStep : 0;
    if (whole > 0) {
        Raw raw;
        if (Source::kAhead) load_raw(Whole{}, source, t, local + thread() * kPer, kPer, &raw);
        for (int step = 0; step < whole; step += kStep) {
            const int at = step + thread() * kPer;
            if (!Source::kAhead) load_raw(Whole{}, source, t, local + at, kPer, &raw);
            const int excluded = entries_of(Whole{}, source, t, local + at, kPer, raw, &entries);
            if (Source::kAhead && step + kStep < whole) load_raw(Whole{}, source, t, local + at + kStep, kPer, &raw);
            body(Whole{}, at, kPer, excluded, entries);
        }
    }
    for (int step = whole; step < n; step += kStep) {
        const int at = step + thread() * kPer, left = n - at, mine = left < 0 ? 0 : left < kPer ? left : kPer;
        Raw raw;
        load_raw(Ragged{}, source, t, local + at, mine, &raw);
        const int excluded = entries_of(Ragged{}, source, t, local + at, mine, raw, &entries);
        body(Ragged{}, at, mine, excluded, entries);
    }
}

// A bound as a chunk sees it: it holds an equal key up to this place in the chunk.
template <class Key>
struct Edge {
    Key key;
    int last;
};
template <class Key>
PSE_HD Edge<Key> edge_of(const Bound<Key>& bound, int64_t first) {
    const int64_t gap = bound.index - first;
    return {bound.key, gap<0 ? -1 : gap>(1 << 24) ? 1 << 24 : int(gap)};
}

// Bit j: the edge holds entry j, which is at this place of the chunk plus j.
template <class Real, class Key>
PSE_DEVICE uint32_t held(Mixed<Real, Key>, const typename Mixed<Real, Key>::Entries& entries, const Edge<Key>& edge,
                         int at) {
    const int last = edge.last - at;
    uint32_t mask = 0;
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) {
        const Key limit = Key(edge.key + Key(j > last ? 1 : 0));
        mask |= uint32_t(entries.key.at[j] >= limit ? 1 : 0) << j;
    }
    return mask;
}

// Bit j: |x_j| < limit, by the sign of the difference, which is exact.
PSE_DEVICE uint32_t below(const Eight<float>& x, float limit) {
    uint32_t mask = 0;
    PSE_UNROLL
    for (int j = kPer - 1; j >= 0; --j)
        mask = (mask << 1) | (float_bits(sub_rn(__builtin_fabsf(x.at[j]), limit)) >> 31);
    return mask;
}
template <class T>
PSE_DEVICE uint32_t held(Same<T>, const typename Same<T>::Entries& entries, const Edge<uint32_t>& edge, int at) {
    constexpr uint32_t kInfinity = KeyTraits<uint32_t>::infinity;
    const float equal = bits_float((edge.key < kInfinity ? edge.key : kInfinity) - 1u);
    const float larger = bits_float(edge.key < kInfinity ? edge.key : kInfinity - 1u);
    const int last = edge.last - at;
    uint32_t out = below(entries.delta, last >= kPer - 1 ? equal : larger);
    if (last >= 0 && last < kPer - 1)
        out &= below(entries.delta, equal) | (~0u << (last + 1));  // one thread of a chunk
    return ~(out | entries.barred) & ((1u << kPer) - 1u);
}

PSE_DEVICE int lowest_bit(uint32_t mask) { return kWarp - 1 - count_leading_zeros(mask & (0u - mask)); }

// x.at[j] for a j that is known at run time, without memory.
template <class T>
PSE_DEVICE T pick(const Eight<T>& x, int j) {
    const bool odd = (j & 1) != 0, second = (j & 2) != 0;
    const T low = second ? (odd ? x.at[3] : x.at[2]) : (odd ? x.at[1] : x.at[0]);
    const T high = second ? (odd ? x.at[7] : x.at[6]) : (odd ? x.at[5] : x.at[4]);
    return j < 4 ? low : high;
}

// What the pool keeps of eligible entry j: its key, and the sign of its delta in the spare top bit. Of fp32 without
// importance that is the delta's bits plus 1.
template <class T>
PSE_DEVICE uint32_t signed_key(Same<T>, const typename Same<T>::Entries& entries, int j) {
    return float_bits(pick(entries.delta, j)) + 1u;
}
template <class Real, class Key>
PSE_DEVICE Key signed_key(Mixed<Real, Key>, const typename Mixed<Real, Key>::Entries& entries, int j) {
    const Key key = pick(entries.key, j);
    const bool negative = (double_bits(double(pick(entries.delta, j))) >> 63) != 0;
    return negative ? Key(key | (Key(1) << KeyTraits<Key>::bits)) : key;
}

// ---- edits

// Rounds one word's elements, from the first on.
PSE_HD uint32_t round_word(float first, float, float) { return float_bits(first); }
PSE_HD uint32_t round_word(float first, float second, bf16_t) { return floats_to_bf16(first, second); }
PSE_HD uint32_t round_word(float first, float second, f16_t) { return floats_to_f16(first, second); }
template <class T>
PSE_HD uint32_t round_word(double first, double second, T which) {
    return round_word(float(first), float(second), which);  // by way of fp32, as torch
}

// Edits one entry; returns 1 if it rounds to what it was. Calls keep(x) with that. Lanes may come alone.
template <class T, class Real, class Keep>
PSE_DEVICE int edit_entry(Global<T> params, int64_t i, Real delta, Real scale, const Keep& keep) {
    T x = load(params, i);
    keep(x);
    Real before, after;
    widen(x, &before);
    round_to(sub_rn(before, mul_rn(scale, delta)), &x);
    widen(x, &after);
    store(params, i, x);
    return before == after ? 1 : 0;
}

// The same for params of any dtype.
template <class Real, class Keep>
PSE_DEVICE int edit_one(const TensorRow& t, int64_t i, Real delta, Real scale, const Keep& keep) {
    const int tag = t.tag(0);
    if (tag == int(DType::f32)) return edit_entry(simt::global<float>(t.params, t.numel), i, delta, scale, keep);
    if (tag == int(DType::f16)) return edit_entry(simt::global<f16_t>(t.params, t.numel), i, delta, scale, keep);
    if (tag == int(DType::bf16)) return edit_entry(simt::global<bf16_t>(t.params, t.numel), i, delta, scale, keep);
    if constexpr (sizeof(Real) == 8) return edit_entry(simt::global<double>(t.params, t.numel), i, delta, scale, keep);
    return 0;
}
// Edits the entries in the mask (bit j: entry i + j); whole warps call together. Only touched 32-byte sectors are
// loaded and stored, whole: a partial one would make the L2 cache read it. Returns how many round to what they were.
// Calls keep.eight(x) with what all were, or keep.one(j, x) with what each of them was.
template <class T, class Step, class Real, class Keep>
PSE_DEVICE int edit_as(Step how, const TensorRow& t, int64_t i, uint32_t mask, const Eight<Real>& delta, Real scale,
                       const Keep& keep) {
    const Global<T> params = simt::streamed<T>(t.params, t.numel);
    // Eight of 32 bits are a sector, of 16 bits those of a pair of lanes.
    if constexpr (Step::value && sizeof(T) <= 4) {
        constexpr int kEach = Packed<T>::kEach;
        const bool touched = kEach == 1 ? mask != 0 : ((ballot(mask != 0) >> (lane() & ~1)) & 3u) != 0;
        if (!touched) return 0;
        Packed<T> x;
        load_packed(how, Global<const T>(params), i, kPer, &x);
        keep.eight(x);
        const uint32_t spread = mask | mask << 15;  // the mask of elements 2 w and 2 w + 1 in bits 2 w and 2 w + 16
        uint32_t same = 0;
        PSE_UNROLL
        for (int w = 0; w < kPer / kEach; ++w) {
            Real before[kEach], edited[2] = {};
            PSE_UNROLL
            for (int e = 0; e < kEach; ++e) {
                widen(x.at(w * kEach + e), &before[e]);
                edited[e] = sub_rn(before[e], mul_rn(scale, delta.at[w * kEach + e]));
            }
            Packed<T> rounded;
            rounded.words[w] = round_word(edited[0], edited[1], T{});
            PSE_UNROLL
            for (int e = 0; e < kEach; ++e) {
                Real after;
                widen(rounded.at(w * kEach + e), &after);
                same |= uint32_t(before[e] == after ? 1 : 0) << (w * kEach + e);
            }
            const uint32_t chosen = kEach == 1 ? 0u - ((mask >> w) & 1u) : ((spread >> (2 * w)) & 0x10001u) * 0xffffu;
            x.words[w] = (rounded.words[w] & chosen) | (x.words[w] & ~chosen);
        }
        store_packed(params, i, x);
        return count_bits(same & mask);
    } else {
        int unchanged = 0;
        PSE_UNROLL
        for (int j = 0; j < kPer; ++j) {
            if (((mask >> j) & 1u) == 0) continue;
            unchanged += edit_entry(params, i + j, delta.at[j], scale, [&](T x) { keep.one(j, x); });
        }
        return unchanged;
    }
}

template <class Step, class T, class Keep>
PSE_DEVICE int edit_eight(Step how, Same<T>, const TensorRow& t, int64_t i, uint32_t mask, const Eight<float>& delta,
                          float scale, const Keep& keep) {
    return edit_as<T>(how, t, i, mask, delta, scale, keep);
}
template <class Step, class Real, class Key, class Keep>
PSE_DEVICE int edit_eight(Step how, Mixed<Real, Key>, const TensorRow& t, int64_t i, uint32_t mask,
                          const Eight<Real>& delta, Real scale, const Keep& keep) {
    if (t.tag(0) == int(DType::f32)) return edit_as<float>(how, t, i, mask, delta, scale, keep);
    if (t.tag(0) == int(DType::f16)) return edit_as<f16_t>(how, t, i, mask, delta, scale, keep);
    if (t.tag(0) == int(DType::bf16)) return edit_as<bf16_t>(how, t, i, mask, delta, scale, keep);
    if constexpr (sizeof(Real) == 8) return edit_as<double>(how, t, i, mask, delta, scale, keep);
    return 0;
}
struct KeepNothing {
    template <class X>
    PSE_METHOD void operator()(X) const {}
    template <class X>
    PSE_METHOD void eight(const X&) const {}
    template <class X>
    PSE_METHOD void one(int, X) const {}
};

PSE_DEVICE void put_bits(int64_t address, int64_t count, int64_t place, int64_t bytes, int64_t bits) {
    if (bytes == 2) store(simt::global<int16_t>(address, count), place, int16_t(bits));
    if (bytes == 4) store(simt::global<int32_t>(address, count), place, int32_t(bits));
    if (bytes == 8) store(simt::global<int64_t>(address, count), place, bits);
}
PSE_DEVICE void put_param(const TensorRow& t, int64_t i, int64_t bits) {
    const int64_t bytes = t.tag(0) == int(DType::f64) ? 8 : t.tag(0) == int(DType::f32) ? 4 : 2;
    put_bits(t.params, t.numel, i, bytes, bits);
}

// ---- sums over a block; every thread takes part

template <class T>
PSE_DEVICE T warp_sum(T x PSE_CALLER) {
    for (int by = kWarp / 2; by > 0; by /= 2) x += shuffle_down(x, by);
    return shuffle(x, 0);
}

// The sum of x over the lanes up to this one.
template <class T>
PSE_DEVICE T scan_warp(T x PSE_CALLER) {
    for (int by = 1; by < kWarp; by *= 2) {
        const T other = shuffle_up(x, by);
        if (lane() >= by) x += other;
    }
    return x;
}

// The sum of x over the threads before this one; `total` is over all. `sums` holds kWarps values.
template <class T>
PSE_DEVICE T scan_block(Shared<T> sums, T x, T* total PSE_CALLER) {
    const T inclusive = scan_warp(x);
    sync_block();  // the sums of an earlier scan have been read
    if (lane() == kWarp - 1) store(sums, warp(), inclusive);
    sync_block();
    T before = 0, all = 0;
    PSE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
        const T sum = load(sums, w);
        before += w < warp() ? sum : T(0);
        all += sum;
    }
    *total = all;
    return before + inclusive - x;
}

// Adds a per-thread count to a counter of tensor or group: one atomic per warp that has any.
PSE_DEVICE void add_count(Global<int64_t> counters, int64_t i, int64_t mine PSE_CALLER) {
    const int64_t sum = warp_sum(mine);
    if (lane() == 0 && sum != 0) atomic_add(counters, i, sum);
}

// ---- launches

// Small tables travel as kernel arguments: nothing on the host has to outlive the call, or a graph's replays.
constexpr int kWords = 448;
struct Words {
    int64_t at[kWords];
};
PSE_KERNEL(kThreads) topm_put_words(Global<int64_t> out, Words words, int64_t count) {
    after_earlier_launches();
    for (int64_t i = thread(); i < count; i += kThreads) store(out, i, words.at[i]);
}
static inline int put_words(const Target& target, int64_t address, const int64_t* words, int64_t count) {
    for (int64_t done = 0; done < count; done += kWords) {
        const int64_t n = count - done < kWords ? count - done : kWords;
        Words part = {};
        for (int64_t i = 0; i < n; ++i) part.at[i] = words[done + i];
        const int error = launch("topm_put_words", target, 1, kThreads, topm_put_words,
                                 simt::global<int64_t>(address + done * 8, n), part, n);
        if (error != 0) return error;
    }
    return 0;
}

static inline int64_t blocks_for(int64_t tasks, int64_t most) { return tasks < most ? tasks : most; }

}  // namespace cuda
}  // namespace pse
