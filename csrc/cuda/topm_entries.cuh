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
PSE_DEVICE void load_eight(Step, Global<const T> p, int64_t i, int n, Eight<T>* out) {
    constexpr int kVector = 16 / int(sizeof(T));
    if constexpr (Step::value) {
        PSE_UNROLL
        for (int v = 0; v < kPer; v += kVector) {
            const Vector<T, kVector> part = load_vector<kVector>(p, i + v);
            PSE_UNROLL
            for (int j = 0; j < kVector; ++j) out->at[v + j] = part.at[j];
        }
    } else {
        PSE_UNROLL
        for (int j = 0; j < kPer; ++j) {
            out->at[j] = T{};
            if (j < n) out->at[j] = load(p, i + j);
        }
    }
}

template <class T, class Step, class Real>
PSE_DEVICE void load_as(Step how, int64_t address, int64_t numel, int64_t i, int n, Eight<Real>* out) {
    Eight<T> raw;
    load_eight(how, simt::global<const T>(address, numel), i, n, &raw);
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) widen(raw.at[j], &out->at[j]);
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

// Params, base and tuned are all T and there is no importance: what a model's edit nearly always is.
template <class T>
struct Same {
    using Real = float;
    using Key = uint32_t;
    static constexpr bool kAhead = true;  // the next step's loads are in flight while one is computed
    struct Raw {
        Eight<T> base, tuned;
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
};

template <class Step, class T>
PSE_DEVICE void load_raw(Step how, Same<T>, const TensorRow& t, int64_t i, int n, typename Same<T>::Raw* raw) {
    load_eight(how, simt::global<const T>(t.base, t.numel), i, n, &raw->base);
    load_eight(how, simt::global<const T>(t.tuned, t.numel), i, n, &raw->tuned);
}
template <class Step, class Real, class Key>
PSE_DEVICE void load_raw(Step how, Mixed<Real, Key>, const TensorRow& t, int64_t i, int n,
                         typename Mixed<Real, Key>::Raw* raw) {
    load_any(how, t.tag(1), t.base, t.numel, i, n, &raw->base);
    load_any(how, t.tag(2), t.tuned, t.numel, i, n, &raw->tuned);
}

// Deltas and keys of the first n; the keys behind them are 0. Returns how many may not be selected.
template <class Step, class T>
PSE_DEVICE int keys_of(Step, Same<T>, const TensorRow&, int64_t, int n, const typename Same<T>::Raw& raw,
                       Eight<float>* delta, Eight<uint32_t>* key) {
    int excluded = 0;
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) {
        float base, tuned;
        widen(raw.base.at[j], &base);
        widen(raw.tuned.at[j], &tuned);
        delta->at[j] = sub_rn(tuned, base);
        const uint32_t k = entry_key<float, uint32_t>(delta->at[j]);
        excluded += (Step::value || j < n) && k == 0 ? 1 : 0;
        key->at[j] = Step::value || j < n ? k : 0u;
    }
    return excluded;
}
template <class Step, class Real, class Key>
PSE_DEVICE int keys_of(Step how, Mixed<Real, Key>, const TensorRow& t, int64_t i, int n,
                       const typename Mixed<Real, Key>::Raw& raw, Eight<Real>* delta, Eight<Key>* key) {
    Eight<Real> weight = {};
    const bool weighted = t.tag(3) != kNoImportance;
    if (weighted) load_any(how, t.tag(3), t.importance, t.numel, i, n, &weight);
    int excluded = 0;
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) {
        delta->at[j] = sub_rn(raw.tuned.at[j], raw.base.at[j]);
        const Key k = weighted ? entry_key<Real, Key>(delta->at[j], weight.at[j]) : entry_key<Real, Key>(delta->at[j]);
        excluded += (Step::value || j < n) && k == 0 ? 1 : 0;
        key->at[j] = Step::value || j < n ? k : Key(0);
    }
    return excluded;
}

// Calls body(step, at, mine, excluded, delta, key) for every step of the n entries of t from `local` on: `at` is this
// thread's first entry of the chunk, `mine` how many it has. A whole block calls, and all of it comes to every step.
template <class Source, class Body>
PSE_DEVICE void for_each_step(Source source, const TensorRow& t, int64_t local, int n, const Body& body) {
    using Raw = typename Source::Raw;
    Eight<typename Source::Real> delta;
    Eight<typename Source::Key> key;
    const int whole = t.aligned() ? n / kStep * kStep : 0;
    if (whole > 0) {
        Raw raw, next;
        if (Source::kAhead) load_raw(Whole{}, source, t, local + thread() * kPer, kPer, &raw);
        for (int step = 0; step < whole; step += kStep) {
            const int at = step + thread() * kPer;
            if (!Source::kAhead) load_raw(Whole{}, source, t, local + at, kPer, &raw);
            if (Source::kAhead) next = raw;
            if (Source::kAhead && step + kStep < whole) load_raw(Whole{}, source, t, local + at + kStep, kPer, &next);
            const int excluded = keys_of(Whole{}, source, t, local + at, kPer, raw, &delta, &key);
            body(Whole{}, at, kPer, excluded, delta, key);
            if (Source::kAhead) raw = next;
        }
    }
    for (int step = whole; step < n; step += kStep) {
        const int at = step + thread() * kPer, left = n - at, mine = left < 0 ? 0 : left < kPer ? left : kPer;
        Raw raw;
        load_raw(Ragged{}, source, t, local + at, mine, &raw);
        const int excluded = keys_of(Ragged{}, source, t, local + at, mine, raw, &delta, &key);
        body(Ragged{}, at, mine, excluded, delta, key);
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

// Bit j: the edge holds key j, the entry at this place of the chunk plus j.
template <class Key>
PSE_DEVICE uint32_t held(const Eight<Key>& key, const Edge<Key>& edge, int at) {
    const int last = edge.last - at;
    uint32_t mask = 0;
    PSE_UNROLL
    for (int j = 0; j < kPer; ++j) {
        const Key limit = Key(edge.key + Key(j > last ? 1 : 0));
        mask |= uint32_t(key.at[j] >= limit ? 1 : 0) << j;
    }
    return mask;
}

// What the pool keeps of an eligible entry: its key, and the sign of its delta in the spare top bit. Of fp32 without
// importance that is the delta's bits plus 1, so the keys need not stay in registers.
template <class T>
PSE_DEVICE uint32_t signed_key(Same<T>, float delta, uint32_t) {
    return float_bits(delta) + 1u;
}
template <class Real, class Key>
PSE_DEVICE Key signed_key(Mixed<Real, Key>, Real delta, Key key) {
    const bool negative = (double_bits(double(delta)) >> 63) != 0;
    return negative ? Key(key | (Key(1) << KeyTraits<Key>::bits)) : key;
}

// ---- edits

// Edits the entries in the mask (bit j: entry i + j); whole warps call together. Only touched 32-byte sectors are
// loaded and stored, whole: a partial one would make the L2 cache read it. Returns how many round to what they were.
template <class T, class Step, class Real>
PSE_DEVICE int edit_as(Step, const TensorRow& t, int64_t i, uint32_t mask, const Eight<Real>& delta, Real scale) {
    constexpr int kVector = 16 / int(sizeof(T));
    constexpr int kSector = sizeof(T) == 8 ? 4 : kPer;  // of 16-bit elements a pair of lanes has a sector
    const Global<T> params = simt::global<T>(t.params, t.numel);
    int unchanged = 0;
    const auto edit = [&](T* x, const Real& d) {
        Real before, after;
        widen(*x, &before);
        round_to(sub_rn(before, mul_rn(scale, d)), x);
        widen(*x, &after);
        unchanged += before == after ? 1 : 0;
    };
    if constexpr (Step::value) {
        bool touched_pair = false;
        if constexpr (sizeof(T) == 2) touched_pair = ((ballot(mask != 0) >> (lane() & ~1)) & 3u) != 0;
        PSE_UNROLL
        for (int sector = 0; sector < kPer; sector += kSector) {
            const uint32_t mine = (mask >> sector) & ((1u << kSector) - 1u);
            if (mine == 0 && !touched_pair) continue;
            T x[kSector];
            PSE_UNROLL
            for (int v = 0; v < kSector; v += kVector) {
                const Vector<T, kVector> part = load_vector<kVector>(params, i + sector + v);
                PSE_UNROLL
                for (int j = 0; j < kVector; ++j) x[v + j] = part.at[j];
            }
            PSE_UNROLL
            for (int j = 0; j < kSector; ++j)
                if ((mine >> j) & 1u) edit(&x[j], delta.at[sector + j]);
            PSE_UNROLL
            for (int v = 0; v < kSector; v += kVector) {
                Vector<T, kVector> part;
                PSE_UNROLL
                for (int j = 0; j < kVector; ++j) part.at[j] = x[v + j];
                store_vector<kVector>(params, i + sector + v, part);
            }
        }
    } else {
        PSE_UNROLL
        for (int j = 0; j < kPer; ++j) {
            if (((mask >> j) & 1u) == 0) continue;
            T x = load(params, i + j);
            edit(&x, delta.at[j]);
            store(params, i + j, x);
        }
    }
    return unchanged;
}

template <class Step, class T>
PSE_DEVICE int edit_eight(Step how, Same<T>, const TensorRow& t, int64_t i, uint32_t mask, const Eight<float>& delta,
                          double scale) {
    return edit_as<T>(how, t, i, mask, delta, float(scale));
}
template <class Step, class Real, class Key>
PSE_DEVICE int edit_eight(Step how, Mixed<Real, Key>, const TensorRow& t, int64_t i, uint32_t mask,
                          const Eight<Real>& delta, double scale) {
    if (t.tag(0) == int(DType::f32)) return edit_as<float>(how, t, i, mask, delta, Real(scale));
    if (t.tag(0) == int(DType::f16)) return edit_as<f16_t>(how, t, i, mask, delta, Real(scale));
    if (t.tag(0) == int(DType::bf16)) return edit_as<bf16_t>(how, t, i, mask, delta, Real(scale));
    if constexpr (sizeof(Real) == 8) return edit_as<double>(how, t, i, mask, delta, Real(scale));
    return 0;
}

// The bits of one param.
PSE_DEVICE int64_t param_bits(const TensorRow& t, int64_t i) {
    if (t.tag(0) == int(DType::f32)) return bits_of(load(simt::global<const float>(t.params, t.numel), i));
    if (t.tag(0) == int(DType::f16)) return bits_of(load(simt::global<const f16_t>(t.params, t.numel), i));
    if (t.tag(0) == int(DType::bf16)) return bits_of(load(simt::global<const bf16_t>(t.params, t.numel), i));
    return bits_of(load(simt::global<const double>(t.params, t.numel), i));
}
template <class T>
PSE_DEVICE int64_t param_bits(Same<T>, const TensorRow& t, int64_t i) {
    return bits_of(load(simt::global<const T>(t.params, t.numel), i));
}
template <class Real, class Key>
PSE_DEVICE int64_t param_bits(Mixed<Real, Key>, const TensorRow& t, int64_t i) {
    return param_bits(t, i);
}
PSE_DEVICE void put_bits(int64_t address, int64_t count, int64_t place, int64_t bytes, int64_t bits) {
    if (bytes == 2) store(simt::global<int16_t>(address, count), place, int16_t(bits));
    if (bytes == 4) store(simt::global<int32_t>(address, count), place, int32_t(bits));
    if (bytes == 8) store(simt::global<int64_t>(address, count), place, bits);
}

// ---- sums over a block; every thread takes part

template <class T>
PSE_DEVICE T warp_sum(T x) {
    for (int by = kWarp / 2; by > 0; by /= 2) x += shuffle_down(x, by);
    return shuffle(x, 0);
}

// The sum of x over the threads before this one; `total` is over all. `sums` holds kWarps values.
template <class T>
PSE_DEVICE T scan_block(Shared<T> sums, T x, T* total) {
    T inclusive = x;
    for (int by = 1; by < kWarp; by *= 2) {
        const T other = shuffle_up(inclusive, by);
        if (lane() >= by) inclusive += other;
    }
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
PSE_DEVICE void add_count(Global<int64_t> counters, int64_t i, int64_t mine) {
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
