// Subtract scale * (tuned - base) from params at the m entries of largest score, or list them.
//
// Bytes  look: base + tuned; edit: params, base, tuned, and the touched 32-element groups of params back.
// Order  (key descending, flat index ascending): no ties, so one result for every thread count and instruction set.
// Story  1 sample positions -> two places A and B in the order that bracket the m-th entry
//        2 sweep: count what A holds (one_pass: edit it), collect what B holds beyond A: the candidates
//        3 settle the candidates: the exact place K of the m-th entry
//        4 edit (or list) what K holds; with one_pass only the chosen candidates are left to do
// Unlucky  Too many candidates, or too few: exact radix select, 16 bits of the key a pass, over what A does not hold.
//        More than m above A: below 1e-30 at 12 sigma (Bernstein). Settled exactly, unless one_pass has edited
//        already: then the status says that params are spoilt.
// Alias  With one_pass params may be base while scale >= 0: an edit never moves an entry nearer to tuned, so what A
//        held it still holds (or its delta overflowed and it is not eligible: neither is it a candidate).
#include "cpu/topm.h"

#include <type_traits>

#include "core/magnitude_key.h"
#include "core/philox.h"
#include "cpu/at_least.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace pse {
namespace PSE_ISA {

constexpr int64_t kChunk = 1 << 15;          // elements per task: 128 KiB of bf16 deltas, 213,000 tasks at 7e9
constexpr int kBlock = 1024;                 // elements per working buffer: all buffers stay in L1
constexpr int64_t kAllCandidates = 1 << 16;  // up to here every entry is a candidate: no sample
constexpr int kPoolBlock = 512;              // pairs that a thread reserves at once
constexpr int kBins = 2048;                  // one settling pass narrows a range by 11 bits
constexpr int kDigits = 1 << 16;             // bins of the exact select
constexpr uint64_t kSampleSeed = 0x70736574'6f706d31u;

// Index: uint32_t where every group is below 2^32 entries (halves what the candidates cost), else int64_t.
// The sign of the delta rides in the key's spare top bit: with the key it is the delta again, where no importance is
// given, and base and tuned need not be fetched a second time.
template <class K, class I>
struct Entry {
    using Key = K;
    using Index = I;
    static constexpr int kSignBit = int(sizeof(K)) * 8 - 1;
    K signed_key;  // 0: an empty slot
    I index;

    K key() const { return signed_key & KeyTraits<K>::none; }
    double delta() const { return signed_key >> kSignBit ? -key_score(key()) : key_score(key()); }
};
static inline uint32_t sign_of(float x) { return float_bits(x) >> 31; }
static inline uint32_t sign_of(double x) { return uint32_t(double_bits(x) >> 63); }

// One group: the entries that compete for the same m. Indices inside are relative to the group.
struct Group {
    const TopmTensor* tensors;
    int64_t num_tensors;
    int64_t first;   // index in the call of the group's first tensor
    int64_t offset;  // flat index of its first entry in the list
    int64_t size;
    int64_t m;
};

static Group group_at(const TopmCall& call, int64_t g) {
    if (call.per_tensor) {
        const TopmTensor& t = call.tensors[g];
        return {&t, 1, g, t.first, t.numel, call.m == nullptr ? 0 : call.m[g]};
    }
    const int64_t n = call.num_tensors;
    const int64_t size = n == 0 ? 0 : call.tensors[n - 1].first + call.tensors[n - 1].numel;
    return {call.tensors, n, 0, 0, size, call.m == nullptr ? 0 : call.m[0]};
}
static int64_t num_groups(const TopmCall& call) { return call.per_tensor ? call.num_tensors : 1; }
static int64_t num_chunks(const Group& group) { return (group.size + kChunk - 1) / kChunk; }

// The tensor that holds the group's entry `index`; empty tensors hold none.
static inline int64_t tensor_of(const Group& group, int64_t index) {
    int64_t low = 0;
    int64_t count = group.num_tensors;
    const int64_t target = group.offset + index;
    while (count > 1) {  // the last tensor whose first entry is at or before the target
        const int64_t half = count / 2;
        low = group.tensors[low + half].first <= target ? low + half : low;
        count -= half;
    }
    return low;
}

// Calls body(tensor, start in the tensor, index in the group, length) for the parts of the group's range [begin, end).
template <class Body>
static inline void for_each_part(const Group& group, int64_t begin, int64_t end, const Body& body) {
    if (begin >= end) return;
    for (int64_t i = tensor_of(group, begin); begin < end; ++i) {
        const TopmTensor& t = group.tensors[i];
        const int64_t local = begin + group.offset - t.first;
        const int64_t left = t.numel - local;
        const int64_t length = left < end - begin ? left : end - begin;
        if (length > 0) body(i, local, begin, length);
        begin += length > 0 ? length : 0;
    }
}

static inline bool is_wide(const TopmTensor& t, bool with_params) {
    const int64_t f64 = int64_t(DType::f64);
    return t.base_dtype == f64 || t.tuned_dtype == f64 || (with_params && t.params_dtype == f64);
}

// ---- keys

// n <= kBlock entries: deltas and keys, the keys padded with 0 to whole groups. Returns how many are not eligible.
template <class Real, class Key>
static inline int64_t load_keys(const TopmTensor& t, int64_t start, int n, Real* __restrict delta,
                                Key* __restrict key) {
    Real other[kBlock];
    load_block(reinterpret_cast<const void*>(t.base), DType(t.base_dtype), start, n, other);
    load_block(reinterpret_cast<const void*>(t.tuned), DType(t.tuned_dtype), start, n, delta);
    Key excluded = 0;
    if (t.importance_dtype < 0) {
        for (int i = 0; i < n; ++i) {
            delta[i] = sub_rn(delta[i], other[i]);
            key[i] = entry_key<Real, Key>(delta[i]);
            excluded += key[i] == 0 ? 1 : 0;
        }
    } else {
        for (int i = 0; i < n; ++i) delta[i] = sub_rn(delta[i], other[i]);
        load_block(reinterpret_cast<const void*>(t.importance), DType(t.importance_dtype), start, n, other);
        for (int i = 0; i < n; ++i) {
            key[i] = entry_key<Real, Key>(delta[i], other[i]);
            excluded += key[i] == 0 ? 1 : 0;
        }
    }
    for (int i = n; i % kGroup != 0; ++i) key[i] = 0;
    return int64_t(excluded);
}

// One entry: its delta, its key.
template <class Real>
static inline Real read_one(int64_t address, int64_t dtype, int64_t local) {
    Real x[1] = {};
    load_block(reinterpret_cast<const void*>(address), DType(dtype), local, 1, x);
    return x[0];
}
template <class Real>
static inline Real delta_of(const TopmTensor& t, int64_t local) {
    return sub_rn(read_one<Real>(t.tuned, t.tuned_dtype, local), read_one<Real>(t.base, t.base_dtype, local));
}
template <class Real, class Key>
static inline Key key_at(const TopmTensor& t, int64_t local) {
    const Real delta = delta_of<Real>(t, local);
    if (t.importance_dtype < 0) return entry_key<Real, Key>(delta);
    return entry_key<Real, Key>(delta, read_one<Real>(t.importance, t.importance_dtype, local));
}
template <class Key>
static inline Key key_of_entry(const TopmCall& call, const TopmTensor& t, int64_t local) {
    if (!is_wide(t, !call.select)) return key_at<float, Key>(t, local);
    if constexpr (sizeof(Key) == 8) return key_at<double, Key>(t, local);
    return 0;  // a float64 tensor makes the whole call wide
}

// ---- edits

static inline void round_to(float x, float* out) { *out = x; }
static inline void round_to(float x, bf16_t* out) { store_element(x, out); }
static inline void round_to(float x, f16_t* out) { store_element(x, out); }
static inline void round_to(double x, double* out) { *out = x; }
static inline void round_to(double x, float* out) { *out = float(x); }
static inline void round_to(double x, bf16_t* out) { store_element(float(x), out); }  // by way of fp32, as torch
static inline void round_to(double x, f16_t* out) { store_element(float(x), out); }

template <class Real>
static inline Real scale_as(double scale);
template <>
inline __attribute__((always_inline)) float scale_as<float>(double scale) {
    return float(scale);
}
template <>
inline __attribute__((always_inline)) double scale_as<double>(double scale) {
    return scale;
}

// *out = take ? x : *out, where take is 0 or -1: bit by bit, so that what is not taken keeps even a NaN's payload.
static inline void blend(bf16_t* out, bf16_t x, int32_t take) {
    out->bits = uint16_t(out->bits ^ ((out->bits ^ x.bits) & uint16_t(take)));
}
static inline void blend(f16_t* out, f16_t x, int32_t take) {
    out->bits = uint16_t(out->bits ^ ((out->bits ^ x.bits) & uint16_t(take)));
}
static inline void blend(float* out, float x, int32_t take) {
    *out = bits_float(float_bits(*out) ^ ((float_bits(*out) ^ float_bits(x)) & uint32_t(take)));
}
static inline void blend(double* out, double x, int32_t take) {
    *out = bits_double(double_bits(*out) ^ ((double_bits(*out) ^ double_bits(x)) & uint64_t(int64_t(take))));
}

// Edits the entries of a group whose key is in [lower, upper); the others keep their bits. `unchanged` counts, lane by
// lane, those that round to what they were: a sum across lanes for every group took as long as the edit itself.
template <class T, class Real, class Key>
static inline __attribute__((always_inline)) void edit_group(T* __restrict params, const Real* __restrict delta,
                                                             const Key* __restrict key, Key lower, Key upper,
                                                             Real scale, int n, int32_t* __restrict unchanged) {
    Real before[kGroup], after[kGroup];
    T rounded[kGroup];
    load_block(params, n, before);
    for (int i = 0; i < n; ++i) round_to(sub_rn(before[i], mul_rn(scale, delta[i])), &rounded[i]);
    load_block(rounded, n, after);
    int32_t chosen[kGroup];
    for (int i = 0; i < n; ++i) chosen[i] = -int32_t((key[i] >= lower) & (key[i] < upper));
    for (int i = 0; i < n; ++i) unchanged[i] -= chosen[i] & -int32_t(before[i] == after[i]);
    for (int i = 0; i < n; ++i) blend(&params[i], rounded[i], chosen[i]);
}

template <class T, class Real, class Key>
static inline void edit_any(T* params, const Real* delta, const Key* key, Key lower, Key upper, Real scale, int n,
                            int32_t* unchanged) {
    if (n == kGroup)
        edit_group(params, delta, key, lower, upper, scale, kGroup, unchanged);
    else
        edit_group(params, delta, key, lower, upper, scale, n, unchanged);
}
static inline int64_t sum_lanes(const int32_t* lanes) {
    int64_t sum = 0;
    for (int i = 0; i < kGroup; ++i) sum += lanes[i];
    return sum;
}

// ---- whole groups in registers: params, base and tuned of one type, bf16 or fp32, without importance. Deltas and keys
// are never stored, which halves what a group costs. The same keys and the same roundings as above, in mask registers.

template <class T, class Real, class Key>
struct InRegisters {
    static constexpr bool possible = false;
};

#if defined(__AVX512BW__)
static inline __m512 load_16(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 load_16(const bf16_t* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
static inline __m512 rounded(__m512 x, const float*) { return x; }
static inline __m512 rounded(__m512 x, const bf16_t*) {  // float_to_bf16, in the high halves
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_and_si512(sum, _mm512_set1_epi32(int(0xffff0000u))), nan,
                                                     _mm512_set1_epi32(0x7fc00000)));
}
static inline void put_32(float* p, __m512 low, __m512 high, uint32_t chosen) {
    _mm512_mask_storeu_ps(p, __mmask16(chosen), low);
    _mm512_mask_storeu_ps(p + 16, __mmask16(chosen >> 16), high);
}
static inline void put_32(bf16_t* p, __m512 low, __m512 high, uint32_t chosen) {
    const __m256i first = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
    const __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
    const __m512i after = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(chosen, _mm512_loadu_si512(p), after));
}

template <class T>
struct InRegisters<T, float, uint32_t> {
    static constexpr bool possible = std::is_same_v<T, float> || std::is_same_v<T, bf16_t>;

    __m512 low, high;   // deltas
    uint32_t excluded;  // a bit per entry: not eligible
    uint32_t at_lower;  // eligible, and the key is at least `lower`
    uint32_t at_upper;

    InRegisters(const T* base, const T* tuned, uint32_t lower, uint32_t upper)
        : low(_mm512_sub_ps(load_16(tuned), load_16(base))),
          high(_mm512_sub_ps(load_16(tuned + 16), load_16(base + 16))) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), largest = _mm512_set1_epi32(0x7f7fffff);
        const __m512i first = _mm512_and_si512(_mm512_castps_si512(low), magnitude);
        const __m512i second = _mm512_and_si512(_mm512_castps_si512(high), magnitude);
        const auto mask = [&](__m512i bound) {  // keys are magnitudes plus 1
            return uint32_t(_mm512_cmpge_epi32_mask(first, bound)) | uint32_t(_mm512_cmpge_epi32_mask(second, bound))
                                                                         << 16;
        };
        excluded = uint32_t(_mm512_cmpgt_epi32_mask(first, largest)) |
                   uint32_t(_mm512_cmpgt_epi32_mask(second, largest)) << 16;
        at_lower = mask(_mm512_set1_epi32(int(lower) - 1)) & ~excluded;
        at_upper = mask(_mm512_set1_epi32(int(upper) - 1)) & ~excluded;
    }

    // Returns how many of the chosen round to what they were.
    int64_t edit(T* params, float scale, uint32_t chosen) const {
        const __m512 s = _mm512_set1_ps(scale), first = load_16(params), second = load_16(params + 16);
        const __m512 one = rounded(_mm512_sub_ps(first, _mm512_mul_ps(s, low)), params);
        const __m512 two = rounded(_mm512_sub_ps(second, _mm512_mul_ps(s, high)), params);
        const uint32_t same = uint32_t(_mm512_cmp_ps_mask(first, one, _CMP_EQ_OQ)) |
                              uint32_t(_mm512_cmp_ps_mask(second, two, _CMP_EQ_OQ)) << 16;
        put_32(params, one, two, chosen);
        return __builtin_popcount(same & chosen);
    }

    void deltas(float* out) const {
        _mm512_storeu_ps(out, low);
        _mm512_storeu_ps(out + 16, high);
    }
};
#endif

// The groups of a block whose edit waited until their lines were asked for; a bit of `chosen` per entry.
template <class Key, class T, class Real>
static inline int32_t edit_fetched(const uint32_t* chosen, int n, T* params, const T* base, const T* tuned,
                                   int64_t first, Real scale) {
    int32_t unchanged = 0;
    for (int i = 0; i < n; i += kGroup) {
        if (chosen[i / kGroup] == 0) continue;
        const int64_t at = first + i;
        const InRegisters<T, Real, Key> group(base + at, tuned + at, 1, 1);  // its deltas; the choice is made
        unchanged += int32_t(group.edit(params + at, scale, chosen[i / kGroup]));
    }
    return unchanged;
}

template <class T>
static inline bool of_one_type(const TopmTensor& t, const T*) {
    constexpr DType dtype = std::is_same_v<T, float> ? DType::f32 : DType::bf16;
    return t.importance_dtype < 0 && t.base_dtype == int64_t(dtype) && t.tuned_dtype == int64_t(dtype);
}

// At low densities the touched lines of params are too scattered for the hardware's prefetcher: ask for those of a
// whole block before the first is edited.
static inline bool edits_are_scattered(const Group& group) { return group.m < group.size / kGroup; }
template <class T>
static inline void fetch_group(const T* params) {
    const char* first = reinterpret_cast<const char*>(params);
    for (int byte = 0; byte < int(kGroup * sizeof(T)); byte += 64) __builtin_prefetch(first + byte, 1);
}
template <class T, class Key>
static inline void fetch_touched(const T* params, const Key* key, int n, Key limit) {
    for (int i = 0; i < n; i += kGroup)
        if (at_least(key + i, limit) != 0) fetch_group(params + i);
}

// Bits as the record keeps them: sign-extended to the widest dtype of the list.
static inline void put_integer(void* out, int64_t place, int bytes, int64_t bits) {
    if (bytes == 2)
        static_cast<int16_t*>(out)[place] = int16_t(bits);
    else if (bytes == 4)
        static_cast<int32_t*>(out)[place] = int32_t(bits);
    else
        static_cast<int64_t*>(out)[place] = bits;
}
static inline int64_t bits_of(const float* x) { return int32_t(float_bits(*x)); }
static inline int64_t bits_of(const double* x) { return int64_t(double_bits(*x)); }
static inline int64_t bits_of(const bf16_t* x) { return int16_t(x->bits); }
static inline int64_t bits_of(const f16_t* x) { return int16_t(x->bits); }

// Calls body(T*, Real) with the tensor's element type and the type it is computed in.
template <class Key, class Body>
static inline void with_types(const TopmTensor& t, bool with_params, const Body& body) {
    const bool wide = is_wide(t, with_params);
    void* params = with_params ? reinterpret_cast<void*>(t.params) : nullptr;
    const DType dtype = with_params ? DType(t.params_dtype) : DType::f32;
    if (wide) {
        if constexpr (sizeof(Key) == 8) switch (dtype) {
                case DType::f32: return body(static_cast<float*>(params), double());
                case DType::f64: return body(static_cast<double*>(params), double());
                case DType::f16: return body(static_cast<f16_t*>(params), double());
                case DType::bf16: return body(static_cast<bf16_t*>(params), double());
            }
    } else {
        switch (dtype) {
            case DType::f32: return body(static_cast<float*>(params), float());
            case DType::f16: return body(static_cast<f16_t*>(params), float());
            case DType::bf16: return body(static_cast<bf16_t*>(params), float());
            case DType::f64: return;  // is wide
        }
    }
}

static inline void count(int64_t* counter, int64_t n) {
    if (n != 0) __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

// ---- 2 sweep

template <class Pair>
struct Pool {
    Pair* pairs;
    int64_t capacity;
    int64_t reserved;  // pairs handed out in blocks; above capacity: overflow
    int64_t dropped;
};

template <class Pair>
struct Cursor {
    using Key = typename Pair::Key;
    using Index = typename Pair::Index;
    Pool<Pair>* pool;
    Pair* next = nullptr;
    Pair* end = nullptr;
    bool full = false;

    void append(Key key, uint32_t sign, int64_t index) {
        if (next == end) {
            if (full) return;
            const int64_t place = __atomic_fetch_add(&pool->reserved, int64_t(kPoolBlock), __ATOMIC_RELAXED);
            if (place + kPoolBlock > pool->capacity) {
                full = true;
                __atomic_store_n(&pool->dropped, int64_t(1), __ATOMIC_RELAXED);
                return;
            }
            next = pool->pairs + place;
            end = next + kPoolBlock;
        }
        *next++ = {Key(key | Key(sign) << Pair::kSignBit), Index(index)};
    }
    void close() {
        while (next != end) *next++ = {Key(0), Index(-1)};
    }
};

struct Totals {
    int64_t above = 0, within = 0, nonfinite = 0;
};

template <class Pair, class Key = typename Pair::Key>
static void sweep(const TopmCall& call, const Group& group, Bound<Key> a, Bound<Key> b, Pool<Pair>* pool,
                  int64_t* chunk_counts, Totals* totals) {
    const int64_t chunks = num_chunks(group);
    const bool scattered = edits_are_scattered(group);
    int64_t next_chunk = 0;
    auto member = [&](int, int) {
        Cursor<Pair> cursor{pool};
        int64_t all_above = 0, all_within = 0, all_nonfinite = 0;
        for (;;) {
            const int64_t chunk = __atomic_fetch_add(&next_chunk, int64_t(1), __ATOMIC_RELAXED);
            if (chunk >= chunks) break;
            const int64_t end = (chunk + 1) * kChunk < group.size ? (chunk + 1) * kChunk : group.size;
            int64_t chunk_above = 0;
            for_each_part(group, chunk * kChunk, end, [&](int64_t which, int64_t local, int64_t index, int64_t length) {
                const TopmTensor& t = group.tensors[which];
                const int64_t out = group.first + which;
                with_types<Key>(t, !call.select, [&](auto* params, auto real) {
                    using Real = decltype(real);
                    using T = std::remove_pointer_t<decltype(params)>;
                    const bool in_registers = of_one_type(t, params);
                    const T* first_base = reinterpret_cast<const T*>(t.base);
                    const T* first_tuned = reinterpret_cast<const T*>(t.tuned);
                    const Real scale = scale_as<Real>(call.scale);
                    Real delta[kBlock];
                    Key key[kBlock];
                    int32_t part_unchanged[kGroup] = {};
                    int64_t part_above = 0, part_nonfinite = 0;
                    for (int64_t done = 0; done < length;) {
                        int64_t stop = done + kBlock < length ? done + kBlock : length;
                        stop = a.limit_end(index + done, index + stop) - index;
                        stop = b.limit_end(index + done, index + stop) - index;
                        const int n = int(stop - done);
                        const Key upper = a.limit(index + done), lower = b.limit(index + done);
                        if constexpr (InRegisters<T, Real, Key>::possible) {
                            if (in_registers) {
                                const int whole = n / kGroup * kGroup;
                                uint32_t later[kBlock / kGroup];  // scattered edits, once their lines are asked for
                                for (int i = 0; i < whole; i += kGroup) {
                                    const int64_t at = local + done + i;
                                    const InRegisters<T, Real, Key> g(first_base + at, first_tuned + at, lower, upper);
                                    part_nonfinite += __builtin_popcount(g.excluded);
                                    part_above += __builtin_popcount(g.at_upper);
                                    later[i / kGroup] = call.one_pass ? g.at_upper : 0;
                                    if (later[i / kGroup] != 0 && scattered)
                                        fetch_group(params + at);
                                    else if (later[i / kGroup] != 0)
                                        part_unchanged[0] += int32_t(g.edit(params + at, scale, g.at_upper));
                                    uint32_t band = g.at_lower & ~g.at_upper;
                                    if (band == 0) continue;
                                    all_within += __builtin_popcount(band);
                                    g.deltas(delta);
                                    for (; band != 0; band &= band - 1) {
                                        const int bit = __builtin_ctz(band);
                                        cursor.append(entry_key<Real, Key>(delta[bit]), sign_of(delta[bit]),
                                                      index + done + i + bit);
                                    }
                                }
                                if (call.one_pass && scattered)
                                    part_unchanged[0] += edit_fetched<Key>(later, whole, params, first_base,
                                                                           first_tuned, local + done, scale);
                                done += whole;
                                if (whole > 0) continue;
                            }
                        }
                        part_nonfinite += load_keys(t, local + done, n, delta, key);
                        if (call.one_pass && scattered) fetch_touched(params + local + done, key, n, upper);
                        for (int i = 0; i < n; i += kGroup) {
                            const uint32_t held = at_least(key + i, lower);
                            if (held == 0) continue;
                            const uint32_t above = at_least(key + i, upper);
                            part_above += __builtin_popcount(above);
                            if (call.one_pass && above != 0)
                                edit_any(params + local + done + i, delta + i, key + i, upper,
                                         Key(KeyTraits<Key>::none), scale, n - i < kGroup ? n - i : kGroup,
                                         part_unchanged);
                            uint32_t band = held & ~above;
                            all_within += __builtin_popcount(band);
                            for (; band != 0; band &= band - 1) {
                                const int bit = __builtin_ctz(band);
                                cursor.append(key[i + bit], sign_of(delta[i + bit]), index + done + i + bit);
                            }
                        }
                        done = stop;
                    }
                    count(&call.nonfinite[out], part_nonfinite);
                    if (call.one_pass) {
                        count(&call.kept[out], part_above);
                        count(&call.unchanged[out], sum_lanes(part_unchanged));
                    }
                    chunk_above += part_above;
                    all_nonfinite += part_nonfinite;
                });
            });
            chunk_counts[chunk] = chunk_above;
            all_above += chunk_above;
        }
        cursor.close();
        count(&totals->above, all_above);
        count(&totals->within, all_within);
        count(&totals->nonfinite, all_nonfinite);
    };
    parallel_team(chunks < call.threads ? int(chunks < 1 ? 1 : chunks) : call.threads, member);
}

// ---- 4 edit or list what `lower` holds and `upper` does not. Records go to `place[chunk]` onwards, in order.

template <class Key>
static void apply_bound(const TopmCall& call, const Group& group, Bound<Key> upper, Bound<Key> lower,
                        const int64_t* place) {
    const bool scattered = edits_are_scattered(group);
    parallel_for(num_chunks(group), call.threads, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * kChunk < group.size ? (chunk + 1) * kChunk : group.size;
        int64_t slot = place == nullptr ? 0 : place[chunk];
        for_each_part(group, chunk * kChunk, end, [&](int64_t which, int64_t local, int64_t index, int64_t length) {
            const TopmTensor& t = group.tensors[which];
            const int64_t out = group.first + which;
            with_types<Key>(t, !call.select, [&](auto* params, auto real) {
                using Real = decltype(real);
                using T = std::remove_pointer_t<decltype(params)>;
                const bool in_registers = of_one_type(t, params);
                const T* first_base = reinterpret_cast<const T*>(t.base);
                const T* first_tuned = reinterpret_cast<const T*>(t.tuned);
                const Real scale = scale_as<Real>(call.scale);
                Real delta[kBlock];
                Key key[kBlock];
                int32_t unchanged[kGroup] = {};
                int64_t kept = 0;
                for (int64_t done = 0; done < length;) {
                    int64_t stop = done + kBlock < length ? done + kBlock : length;
                    stop = upper.limit_end(index + done, index + stop) - index;
                    stop = lower.limit_end(index + done, index + stop) - index;
                    const int n = int(stop - done);
                    const Key high = upper.limit(index + done), low = lower.limit(index + done);
                    if constexpr (InRegisters<T, Real, Key>::possible) {
                        if (in_registers && !call.select && place == nullptr) {
                            const int whole = n / kGroup * kGroup;
                            uint32_t later[kBlock / kGroup];  // scattered edits, once their lines are asked for
                            for (int i = 0; i < whole; i += kGroup) {
                                const int64_t at = local + done + i;
                                const InRegisters<T, Real, Key> g(first_base + at, first_tuned + at, low, high);
                                const uint32_t chosen = g.at_lower & ~g.at_upper;
                                kept += __builtin_popcount(chosen);
                                later[i / kGroup] = chosen;
                                if (chosen != 0 && scattered)
                                    fetch_group(params + at);
                                else if (chosen != 0)
                                    unchanged[0] += int32_t(g.edit(params + at, scale, chosen));
                            }
                            if (scattered)
                                unchanged[0] += edit_fetched<Key>(later, whole, params, first_base, first_tuned,
                                                                  local + done, scale);
                            done += whole;
                            if (whole > 0) continue;
                        }
                    }
                    load_keys(t, local + done, n, delta, key);
                    if (!call.select && scattered) fetch_touched(params + local + done, key, n, low);
                    for (int i = 0; i < n; i += kGroup) {
                        uint32_t chosen = at_least(key + i, low);
                        if (chosen != 0) chosen &= ~at_least(key + i, high);
                        if (chosen == 0) continue;
                        kept += __builtin_popcount(chosen);
                        const int64_t at = local + done + i;
                        if (place != nullptr)
                            for (uint32_t rest = chosen; rest != 0; rest &= rest - 1, ++slot) {
                                const int bit = __builtin_ctz(rest);
                                call.indices[slot] = call.select ? at + bit : t.first + at + bit;
                                if (!call.select)
                                    put_integer(call.values, slot, call.value_bytes, bits_of(params + at + bit));
                                else if (call.value_bytes == 8)
                                    static_cast<double*>(call.values)[slot] = double(delta[i + bit]);
                                else
                                    static_cast<float*>(call.values)[slot] = float(delta[i + bit]);
                            }
                        if (!call.select)
                            edit_any(params + at, delta + i, key + i, low, high, scale, n - i < kGroup ? n - i : kGroup,
                                     unchanged);
                    }
                    done = stop;
                }
                count(&call.kept[out], kept);
                count(&call.unchanged[out], sum_lanes(unchanged));
            });
        });
    });
}

// Returns 1 if the rounded result is what it was.
template <class Real, class T>
static inline int64_t edit_one(T* params, Real delta, Real scale) {
    Real before[1], after[1];
    load_block(params, 1, before);
    round_to(sub_rn(before[0], mul_rn(scale, delta)), params);
    load_block(params, 1, after);
    return before[0] == after[0];
}

static inline void prefetch(int64_t address, int64_t dtype, int64_t local) {
    __builtin_prefetch(reinterpret_cast<const char*>(address) + local * dtype_size(DType(dtype)));
}

// one_pass: the chosen candidates are scattered. Runs of one chunk are in order, so the tensor rarely changes.
template <class Pair, class Key = typename Pair::Key>
static void edit_chosen(const TopmCall& call, const Group& group, const Pair* pairs, int64_t n, Bound<Key> bound) {
    constexpr int64_t kRun = 1 << 12;
    constexpr int kBatch = 64;  // entries whose cache lines are fetched ahead of their edit
    parallel_for((n + kRun - 1) / kRun, call.threads, [&](int64_t run) {
        const int64_t end = (run + 1) * kRun < n ? (run + 1) * kRun : n;
        int64_t local[kBatch];
        double delta[kBatch];
        int64_t which = 0, tensor_begin = 0, tensor_end = 0;
        int waiting = 0;
        const auto edit_waiting = [&] {
            if (waiting == 0) return;
            const TopmTensor& t = group.tensors[which];
            int64_t unchanged = 0;
            with_types<Key>(t, true, [&](auto* params, auto real) {
                using Real = decltype(real);
                const Real scale = scale_as<Real>(call.scale);
                for (int i = 0; i < waiting; ++i)
                    unchanged += edit_one(params + local[i],
                                          t.importance_dtype < 0 ? Real(delta[i]) : delta_of<Real>(t, local[i]), scale);
            });
            count(&call.kept[group.first + which], waiting);
            count(&call.unchanged[group.first + which], unchanged);
            waiting = 0;
        };
        for (int64_t p = run * kRun; p < end; ++p) {
            const Pair pair = pairs[p];
            const int64_t index = int64_t(pair.index);
            if (pair.signed_key == 0 || !bound.holds(pair.key(), index)) continue;
            if (index < tensor_begin || index >= tensor_end) {
                edit_waiting();
                which = tensor_of(group, index);
                tensor_begin = group.tensors[which].first - group.offset;
                tensor_end = tensor_begin + group.tensors[which].numel;
            }
            const TopmTensor& t = group.tensors[which];
            local[waiting] = index - tensor_begin;
            delta[waiting] = pair.delta();
            prefetch(t.params, t.params_dtype, local[waiting]);
            if (t.importance_dtype >= 0) {
                prefetch(t.base, t.base_dtype, local[waiting]);
                prefetch(t.tuned, t.tuned_dtype, local[waiting]);
            }
            if (++waiting == kBatch) edit_waiting();
        }
        edit_waiting();
    });
}

// ---- 3 settle: the rank-th pair (from 1) in the order; the keys lie in [least, most]. Range-adaptive radix: at most 3
// passes over 32-bit keys, 6 over 64-bit ones, then as many over the indices of equal keys. `work` has room for n
// pairs.

// What is left after a pass is in `work`; the first pass reads `pairs` and leaves them as they are.
template <class Pair, class Value>
static int64_t narrow(const Pair* pairs, int64_t n, Pair* work, uint64_t low, uint64_t high, int64_t* rank,
                      uint64_t* low_out, uint64_t* high_out, int threads, const Value& value) {
    int shift = 0;
    while (((high - low) >> shift) >= uint64_t(kBins)) ++shift;
    int64_t counts[kBins] = {};
    constexpr int64_t kRun = 1 << 16;
    parallel_for((n + kRun - 1) / kRun, threads, [&](int64_t run) {
        const int64_t end = (run + 1) * kRun < n ? (run + 1) * kRun : n;
        uint32_t mine[kBins] = {};
        for (int64_t i = run * kRun; i < end; ++i) {
            const uint64_t v = value(pairs[i]);
            if (v >= low && v <= high) ++mine[(v - low) >> shift];
        }
        for (int bin = 0; bin < kBins; ++bin) count(&counts[bin], mine[bin]);
    });
    int bin = 0;
    while (bin < kBins - 1 && counts[bin] < *rank) *rank -= counts[bin++];
    *low_out = low + (uint64_t(bin) << shift);
    const uint64_t last = *low_out + ((uint64_t(1) << shift) - 1);
    *high_out = last < high ? last : high;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t v = value(pairs[i]);
        if (v >= *low_out && v <= *high_out) work[left++] = pairs[i];
    }
    return left;
}

template <class Pair, class Key = typename Pair::Key>
static Bound<Key> rank_of(const Pair* pairs, int64_t n, Pair* work, int64_t rank, Key least, Key most, int threads) {
    // Descending key = ascending complement; empty slots (key 0) come out above every range.
    const auto by_key = [](const Pair& pair) { return uint64_t(KeyTraits<Key>::none) - uint64_t(pair.key()); };
    const auto by_index = [](const Pair& pair) { return uint64_t(pair.index); };
    uint64_t low = uint64_t(KeyTraits<Key>::none) - uint64_t(most);
    uint64_t high = uint64_t(KeyTraits<Key>::none) - uint64_t(least < 1 ? 1 : least);
    do {
        n = narrow(pairs, n, work, low, high, &rank, &low, &high, threads, by_key);
        pairs = work;
    } while (low < high);
    const Key key = Key(uint64_t(KeyTraits<Key>::none) - low);
    low = ~uint64_t(0);
    high = 0;
    for (int64_t i = 0; i < n; ++i) {
        low = by_index(pairs[i]) < low ? by_index(pairs[i]) : low;
        high = by_index(pairs[i]) > high ? by_index(pairs[i]) : high;
    }
    while (low < high) n = narrow(pairs, n, work, low, high, &rank, &low, &high, threads, by_index);
    return {key, int64_t(low)};
}

// ---- the exact select over the list, for streams, ranks and the unlucky path

constexpr int kDigitBits = 16;

// Keys are 31 or 63 bits: 2 or 4 rounds, the first digit first.
template <class Key>
static inline int digit_shift(int round) {
    return int(sizeof(Key)) * 8 - kDigitBits * (round + 1);
}

// Calls body(key, index in the group) for every entry of a chunk that is eligible and that `above` does not hold.
template <class Key, class Body>
static inline int64_t for_each_key(const TopmCall& call, const Group& group, int64_t chunk, Bound<Key> above,
                                   int64_t* nonfinite, const Body& body) {
    const int64_t end = (chunk + 1) * kChunk < group.size ? (chunk + 1) * kChunk : group.size;
    for_each_part(group, chunk * kChunk, end, [&](int64_t which, int64_t local, int64_t index, int64_t length) {
        const TopmTensor& t = group.tensors[which];
        with_types<Key>(t, !call.select, [&](auto*, auto real) {
            using Real = decltype(real);
            Real delta[kBlock];
            Key key[kBlock];
            int64_t excluded = 0;
            for (int64_t done = 0; done < length; done += kBlock) {
                const int n = int(length - done < kBlock ? length - done : kBlock);
                excluded += load_keys(t, local + done, n, delta, key);
                for (int i = 0; i < n; ++i)
                    if (key[i] != 0 && !above.holds(key[i], index + done + i)) body(key[i], index + done + i);
            }
            if (nonfinite != nullptr) count(&nonfinite[group.first + which], excluded);
        });
    });
    return 0;
}

template <class Key>
static void add_histogram(const TopmCall& call, const Group& group, Bound<Key> above, Key prefix, int round,
                          int64_t* nonfinite, int64_t* histogram) {
    const int shift = digit_shift<Key>(round);
    const int settled = shift + kDigitBits;
    parallel_for(num_chunks(group), call.threads, [&](int64_t chunk) {
        int64_t bin = 0, run = 0;  // equal neighbours are counted at once: ties would fight over one bin
        for_each_key(call, group, chunk, above, nonfinite, [&](Key key, int64_t) {
            if (round > 0 && (key >> settled) != (prefix >> settled)) return;
            const int64_t digit = int64_t((key >> shift) & Key(kDigits - 1));
            if (digit != bin) {
                count(&histogram[bin], run);
                bin = digit;
                run = 0;
            }
            ++run;
        });
        count(&histogram[bin], run);
    });
}

// The index in the group of the ties-th entry of `key` that `above` does not hold; the last index if there are fewer.
template <class Key>
static int64_t find_tie(const TopmCall& call, const Group& group, Bound<Key> above, Key wanted, int64_t ties,
                        int64_t* found) {
    // Two looks, so that no scratch is needed: chunks are counted in order until the one that holds the tie.
    const int64_t chunks = num_chunks(group);
    constexpr int64_t kWave = 1024;
    int64_t counts[kWave];
    *found = 0;
    for (int64_t wave = 0; wave < chunks; wave += kWave) {
        const int64_t n = chunks - wave < kWave ? chunks - wave : kWave;
        parallel_for(n, call.threads, [&](int64_t c) {
            int64_t equal = 0;
            for_each_key<Key>(call, group, wave + c, above, nullptr, [&](Key key, int64_t) { equal += key == wanted; });
            counts[c] = equal;
        });
        for (int64_t c = 0; c < n; ++c) {
            if (*found + counts[c] < ties) {
                *found += counts[c];
                continue;
            }
            int64_t left = ties - *found, place = -1;
            *found = ties;
            if (ties == 0) return -1;
            parallel_for(1, 1, [&](int64_t) {
                for_each_key<Key>(call, group, wave + c, above, nullptr, [&](Key key, int64_t index) {
                    if (key == wanted && --left == 0) place = index;
                });
            });
            return place;
        }
    }
    return group.size - 1;
}

// The rank-th entry (from 1) that `above` does not hold; there are at least that many.
template <class Key>
static Bound<Key> select_exactly(const TopmCall& call, const Group& group, Bound<Key> above, int64_t rank,
                                 int64_t* histogram) {
    Key prefix = 0;
    for (int round = 0; round * kDigitBits < int(sizeof(Key)) * 8; ++round) {
        for (int i = 0; i < kDigits; ++i) histogram[i] = 0;
        add_histogram(call, group, above, prefix, round, nullptr, histogram);
        int digit = kDigits - 1;
        while (digit > 0 && histogram[digit] < rank) rank -= histogram[digit--];
        prefix |= Key(digit) << digit_shift<Key>(round);
    }
    int64_t found;
    return {prefix, find_tie(call, group, above, prefix, rank, &found)};
}

// ---- 1 sample

// One position is drawn from every stratum of `width` neighbours. Strata are visited in order, so that the hardware's
// prefetchers and the TLB see a stream; the ranks of a stratified sample spread no more than those of independent draws
// (sum p_i (1 - p_i) <= s q (1 - q)), and the less than `width` entries behind the last stratum shift a rank by less
// than 1. About N^(2/3) positions: what a position costs (two cache misses) against what a candidate costs.
struct Strata {
    int64_t width, count;
};
static Strata strata_of(int64_t n) {
    int64_t s = 1 << 12;
    while (s < (1 << 22) && double(s) * double(s) * double(s) < double(n) * double(n)) s *= 2;
    const int64_t width = n / s < 1 ? 1 : n / s;
    return {width, n / width};
}
static int64_t sample_size(int64_t n) { return strata_of(n).count; }

// Ranks between the expected place of the m-th entry in the sample and an edge of the bracket. Upper edge with
// one_pass, where a miss cannot be repaired: 12 sigma, and 64 ranks for thin tails: Bernstein's bound is below 1e-30
// for every m, N and s. Elsewhere a miss costs one exact select: 5 sigma (3e-7), which more than halves the candidates.
static int64_t sample_margin(int64_t s, int64_t n, int64_t m, bool unrepairable) {
    const double q = double(m) / double(n);
    const double sigma = __builtin_sqrt(double(s) * q * (1.0 - q));
    return unrepairable ? int64_t(12.0 * sigma) + 64 : int64_t(5.0 * sigma) + 16;
}

static int64_t pool_capacity(const TopmCall& call, const Group& group) {
    const int64_t blocks = int64_t(call.threads + 1) * kPoolBlock;
    if (call.hooks & kHookOverflow) return 0;
    if (call.hooks & kHookTwoPass) return 0;
    if (group.size <= kAllCandidates && !(call.hooks & kHookAlwaysSample)) return group.size + blocks;
    const int64_t s = sample_size(group.size);
    const int64_t ranks =
        sample_margin(s, group.size, group.m, call.one_pass) + sample_margin(s, group.size, group.m, false);
    const double band = double(ranks) / double(s) * double(group.size);
    const double room = 1.5 * band + 4096.0;
    return (room < double(group.size) ? int64_t(room) : group.size) + blocks;
}

template <class Pair, class Key = typename Pair::Key>
static void draw_sample(const TopmCall& call, const Group& group, Pair* pairs, int64_t s) {
    constexpr int kInFlight = 64;  // positions per thread
    const int64_t width = strata_of(group.size).width;
    parallel_for((s + kInFlight - 1) / kInFlight, call.threads, [&](int64_t run) {
        const int64_t first = run * kInFlight;
        const int n = int(s - first < kInFlight ? s - first : kInFlight);
        int64_t index[kInFlight], which[kInFlight];
        PhiloxBlock block = {};
        for (int i = 0; i < n; ++i) {
            if (i % 4 == 0) block = philox(kSampleSeed, uint64_t(first + i) / 4, 0);
            index[i] = (first + i) * width + int64_t((uint64_t(block.word[i % 4]) * uint64_t(width)) >> 32);
            which[i] = tensor_of(group, index[i]);
            const TopmTensor& t = group.tensors[which[i]];
            const int64_t local = index[i] + group.offset - t.first;
            prefetch(t.base, t.base_dtype, local);
            prefetch(t.tuned, t.tuned_dtype, local);
            if (t.importance_dtype >= 0) prefetch(t.importance, t.importance_dtype, local);
        }
        for (int i = 0; i < n; ++i) {
            const TopmTensor& t = group.tensors[which[i]];
            const Key key = key_of_entry<Key>(call, t, index[i] + group.offset - t.first);
            pairs[first + i] = {key, typename Pair::Index(index[i])};
        }
    });
}

// The sampled place of this rank; before the first rank nothing is held, after the last eligible one everything.
template <class Pair, class Key = typename Pair::Key>
static Bound<Key> sampled(const Pair* pairs, int64_t s, int64_t eligible, Pair* work, int64_t rank, int threads) {
    if (rank < 1) return nothing<Key>();
    if (rank > eligible) return everything<Key>();
    return rank_of(pairs, s, work, rank, Key(1), nothing<Key>().key, threads);
}

// ---- the whole

template <class Key>
struct Settled {
    Bound<Key> bound;   // holds exactly the selected
    Bound<Key> edited;  // one_pass: what the sweep has edited
    int64_t pool_used;  // one_pass: candidates to edit; -1: by another pass
};

struct Scratch {
    void* settled;
    int64_t* chunk_counts;
    int64_t* histogram;
    char* pairs;
    char* work;
    int64_t bytes;
};

template <class Pair>
static Scratch lay_out(const TopmCall& call) {
    int64_t chunks = 0, most = 0;
    for (int64_t g = 0; g < num_groups(call); ++g) {
        const Group group = group_at(call, g);
        chunks += num_chunks(group);
        int64_t pairs = pool_capacity(call, group);
        const int64_t s = sample_size(group.size);
        if (group.size > kAllCandidates || (call.hooks & kHookAlwaysSample)) pairs = pairs < s ? s : pairs;
        most = pairs > most ? pairs : most;
    }
    char* at = static_cast<char*>(call.scratch);
    const auto take = [&](int64_t bytes) {
        char* taken = at;
        at += (bytes + 63) / 64 * 64;
        return taken;
    };
    Scratch scratch;
    scratch.settled = take(num_groups(call) * int64_t(sizeof(Settled<typename Pair::Key>)));
    scratch.chunk_counts = reinterpret_cast<int64_t*>(take(chunks * 8));
    scratch.histogram = reinterpret_cast<int64_t*>(take(kDigits * 8));
    scratch.pairs = take(most * int64_t(sizeof(Pair)));
    scratch.work = take(most * int64_t(sizeof(Pair)));
    scratch.bytes = at - static_cast<char*>(call.scratch);
    return scratch;
}

template <class Pair, class Key = typename Pair::Key>
static TopmStatus settle(const TopmCall& call, const Group& group, const Scratch& scratch, int64_t* chunk_counts,
                         Settled<Key>* settled) {
    Pair* pairs = reinterpret_cast<Pair*>(scratch.pairs);
    Pair* work = reinterpret_cast<Pair*>(scratch.work);
    Bound<Key> a = nothing<Key>(), b = everything<Key>();
    if (group.m == 0) {
        b = nothing<Key>();
    } else if (call.hooks & kHookTwoPass) {
        b = nothing<Key>();
    } else if (group.size > kAllCandidates || ((call.hooks & kHookAlwaysSample) && group.size > 0)) {
        const int64_t s = sample_size(group.size);
        draw_sample(call, group, pairs, s);
        int64_t eligible = 0;
        for (int64_t i = 0; i < s; ++i) eligible += pairs[i].signed_key != 0;
        const int64_t middle = int64_t(double(s) * (double(group.m) / double(group.size)));
        const int64_t up = sample_margin(s, group.size, group.m, call.one_pass);
        const int64_t down = sample_margin(s, group.size, group.m, false);
        a = sampled(pairs, s, eligible, work, middle - up, call.threads);
        b = sampled(pairs, s, eligible, work, middle + down + 1, call.threads);
    }
    // What one_pass edits must be below m and a proper place: the score of the last one edited is then known.
    if (call.one_pass && a.key == 0) a = nothing<Key>();
    if (call.hooks & kHookTooFew) b = a;
    if (call.hooks & kHookTooMany) a = b = everything<Key>();

    Pool<Pair> pool{pairs, pool_capacity(call, group), 0, 0};
    Totals totals;
    sweep(call, group, a, b, &pool, chunk_counts, &totals);
    const int64_t available = group.size - totals.nonfinite;
    const int64_t m = group.m < available ? group.m : available;  // entries that may not be selected never are
    const int64_t need = m - totals.above;

    settled->edited = call.one_pass ? a : nothing<Key>();
    settled->pool_used = 0;
    if (m == 0) {
        settled->bound = nothing<Key>();
    } else if (need == 0) {
        settled->bound = a;  // a sampled entry, or everything: below is where the score of the last one is found
        if (a.key == 0) settled->bound = select_exactly(call, group, nothing<Key>(), m, scratch.histogram);
    } else if (need > 0 && need <= totals.within && pool.dropped == 0) {
        settled->pool_used = pool.reserved;
        settled->bound = rank_of(pairs, pool.reserved, work, need, b.key, a.key, call.threads);
    } else {
        if (need < 0 && call.one_pass) return kTopmSpoilt;
        const Bound<Key> above = need < 0 ? nothing<Key>() : a;
        settled->bound = select_exactly(call, group, above, need < 0 ? m : need, scratch.histogram);
        settled->pool_used = -1;
    }
    const double score = m == 0 ? double(bits_float(0x7f800000u)) : key_score(settled->bound.key);
    for (int64_t i = group.first; i < group.first + group.num_tensors; ++i) {
        if (call.wide)
            static_cast<double*>(call.threshold)[i] = score;
        else
            static_cast<float*>(call.threshold)[i] = float(score);
    }

    if (call.one_pass) {
        if (settled->pool_used > 0) edit_chosen(call, group, pairs, pool.reserved, settled->bound);
        if (settled->pool_used < 0) apply_bound(call, group, settled->edited, settled->bound, nullptr);
        return kTopmDone;
    }
    if (call.indices == nullptr) return kTopmDone;
    // A record is written in order: how many each chunk selects says where each starts.
    if (settled->pool_used >= 0) {
        for (int64_t i = 0; i < settled->pool_used; ++i)
            if (pairs[i].signed_key != 0 && settled->bound.holds(pairs[i].key(), int64_t(pairs[i].index)))
                ++chunk_counts[int64_t(pairs[i].index) / kChunk];
    } else {
        parallel_for(num_chunks(group), call.threads, [&](int64_t chunk) {
            int64_t held = 0;
            for_each_key(call, group, chunk, nothing<Key>(), nullptr,
                         [&](Key key, int64_t index) { held += settled->bound.holds(key, index); });
            chunk_counts[chunk] = held;
        });
    }
    return kTopmDone;
}

template <class Pair, class Key = typename Pair::Key>
static TopmStatus run_as(const TopmCall& call) {
    const Scratch scratch = lay_out<Pair>(call);
    Settled<Key>* settled = static_cast<Settled<Key>*>(scratch.settled);
    int64_t* counts = scratch.chunk_counts;
    for (int64_t g = 0; g < num_groups(call); ++g) {
        const Group group = group_at(call, g);
        const TopmStatus status = settle<Pair>(call, group, scratch, counts, &settled[g]);
        if (status != kTopmDone) return status;
        counts += num_chunks(group);
    }
    if (call.one_pass) return kTopmDone;
    if (call.check_finite)
        for (int64_t i = 0; i < call.num_tensors; ++i)
            if (call.nonfinite[i] != 0) return kTopmNotFinite;
    counts = scratch.chunk_counts;
    int64_t place = 0;
    for (int64_t g = 0; g < num_groups(call); ++g) {
        const Group group = group_at(call, g);
        if (call.indices != nullptr)
            for (int64_t chunk = 0; chunk < num_chunks(group); ++chunk) {
                const int64_t here = counts[chunk];
                counts[chunk] = place;
                place += here;
            }
        if (group.m > 0)
            apply_bound(call, group, nothing<Key>(), settled[g].bound, call.indices == nullptr ? nullptr : counts);
        counts += num_chunks(group);
    }
    return kTopmDone;
}

using NarrowPair = Entry<uint32_t, uint32_t>;
using LongPair = Entry<uint32_t, int64_t>;
using WidePair = Entry<uint64_t, int64_t>;

static bool is_long(const TopmCall& call) {
    int64_t largest = 0;
    for (int64_t g = 0; g < num_groups(call); ++g) {
        const int64_t size = group_at(call, g).size;
        largest = size > largest ? size : largest;
    }
    return largest > int64_t(UINT32_MAX) || (call.hooks & kHookLongIndex);
}

static int64_t scratch_bytes(const TopmCall& call) {
    TopmCall empty = call;
    empty.scratch = nullptr;
    if (call.wide) return lay_out<WidePair>(empty).bytes;
    return is_long(call) ? lay_out<LongPair>(empty).bytes : lay_out<NarrowPair>(empty).bytes;
}

static TopmStatus run(const TopmCall& call) {
    TopmStatus status = kTopmDone;
    auto whole = [&](int, int) {
        status = call.wide ? run_as<WidePair>(call) : is_long(call) ? run_as<LongPair>(call) : run_as<NarrowPair>(call);
    };
    parallel_team(1, whole);  // IEEE mode also between the parallel regions: a threshold may be subnormal
    return status;
}

static void histogram(const TopmCall& call, uint64_t prefix, int round, int64_t* counts) {
    int64_t* nonfinite = round == 0 ? call.nonfinite : nullptr;
    if (call.wide)
        add_histogram(call, group_at(call, 0), nothing<uint64_t>(), uint64_t(prefix), round, nonfinite, counts);
    else
        add_histogram(call, group_at(call, 0), nothing<uint32_t>(), uint32_t(prefix), round, nonfinite, counts);
}

static int64_t tie_index(const TopmCall& call, uint64_t key, int64_t ties, int64_t* found) {
    return call.wide ? find_tie(call, group_at(call, 0), nothing<uint64_t>(), uint64_t(key), ties, found)
                     : find_tie(call, group_at(call, 0), nothing<uint32_t>(), uint32_t(key), ties, found);
}

static void apply(const TopmCall& call, uint64_t key, int64_t index) {
    if (call.wide)
        apply_bound(call, group_at(call, 0), nothing<uint64_t>(), Bound<uint64_t>{key, index}, nullptr);
    else
        apply_bound(call, group_at(call, 0), nothing<uint32_t>(), Bound<uint32_t>{uint32_t(key), index}, nullptr);
}

// ---- sparse

static void sparse(const TopmTensor* tensors, int64_t num_tensors, const int64_t* counts, const int64_t* indices,
                   const void* values, int values_wide, const int64_t* delta_wide, double scale, int64_t* unchanged,
                   int64_t* undo_indices, void* bits, int bits_bytes, int threads) {
    constexpr int64_t kRun = 1 << 14;
    int64_t first = 0;
    for (int64_t which = 0; which < num_tensors; first += counts[which++]) {
        TopmTensor t = tensors[which];
        // is_wide() asks the dtypes: a delta that was computed in fp64 stands for both.
        t.base_dtype = t.tuned_dtype = int64_t(delta_wide[which] ? DType::f64 : DType::f32);
        parallel_for((counts[which] + kRun - 1) / kRun, threads, [&](int64_t run) {
            const int64_t end = (run + 1) * kRun < counts[which] ? (run + 1) * kRun : counts[which];
            with_types<uint64_t>(t, true, [&](auto* params, auto real) {
                using Real = decltype(real);
                const Real factor = scale_as<Real>(scale);
                int64_t same = 0;
                for (int64_t i = first + run * kRun; i < first + end; ++i) {
                    auto* at = params + indices[i];
                    if (bits != nullptr) {
                        undo_indices[i] = t.first + indices[i];
                        put_integer(bits, i, bits_bytes, bits_of(at));
                    }
                    const Real delta = values_wide ? Real(static_cast<const double*>(values)[i])
                                                   : Real(static_cast<const float*>(values)[i]);
                    Real before[1], after[1];
                    load_block(at, 1, before);
                    round_to(sub_rn(before[0], mul_rn(factor, delta)), at);
                    load_block(at, 1, after);
                    same += before[0] == after[0];
                }
                count(&unchanged[which], same);
            });
        });
    }
}

static int64_t first_bad_index(const int64_t* numel, int64_t num_tensors, const int64_t* counts, const int64_t* indices,
                               int threads) {
    constexpr int64_t kRun = 1 << 16;
    int64_t first = 0;
    int64_t worst = INT64_MAX;
    for (int64_t which = 0; which < num_tensors; first += counts[which++]) {
        parallel_for((counts[which] + kRun - 1) / kRun, threads, [&](int64_t run) {
            const int64_t end = (run + 1) * kRun < counts[which] ? (run + 1) * kRun : counts[which];
            const int64_t* mine = indices + first;
            uint64_t bad = 0;
            for (int64_t i = run * kRun; i < end; ++i) {
                const int64_t before = i == 0 ? -1 : mine[i - 1];
                bad |= uint64_t(mine[i] <= before) | uint64_t(mine[i] >= numel[which]) | uint64_t(mine[i] < 0);
            }
            if (bad == 0) return;
            for (int64_t i = run * kRun; i < end; ++i) {
                const int64_t before = i == 0 ? -1 : mine[i - 1];
                if (mine[i] > before && mine[i] < numel[which] && mine[i] >= 0) continue;
                int64_t seen = __atomic_load_n(&worst, __ATOMIC_RELAXED);
                while (first + i < seen && !__atomic_compare_exchange_n(&worst, &seen, first + i, true,
                                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                }
                return;
            }
        });
    }
    return worst == INT64_MAX ? -1 : worst;
}

extern const TopmKernels topm_kernels;
const TopmKernels topm_kernels = {scratch_bytes, run, histogram, tie_index, apply, sparse, first_bad_index};

}  // namespace PSE_ISA
}  // namespace pse
