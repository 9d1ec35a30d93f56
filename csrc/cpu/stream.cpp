// What the streamed harm vector does to every element and entry; files, checks and memory are Python's.
//
// collect  one look at a chunk: difference, histogram, energy, fingerprint, and the entries at or above an edge.
// the rest the same data as entries, on their way into and out of a file.
// All of it runs in the caller's thread: callers work on several chunks at once.
#include "cpu/stream.h"

#include <stddef.h>

#include <type_traits>

#include "cpu/at_least.h"
#include "cpu/convert.h"
#include "cpu/lanes.h"

namespace pse {
namespace PSE_ISA {

constexpr int64_t kPart = 1 << 14;  // elements whose sums are added up by themselves: short sums lose fewer bits
constexpr int kBlock = 1024;        // elements per working buffer: all buffers stay in L1
constexpr int kLanes = 8;           // partial sums of squares, whatever the instruction set
constexpr int kMostGapBytes = 7;    // 49 bits: tensors have at most 2^48 elements

// ---- sums

// Sums are added lane by lane. Padded with zeros by the caller to whole groups of lanes.
struct Lanes {
    Doubles lane[kLanes / kWidth];
};
template <class Real>
static inline void add_squares(const Real* x, int n, Lanes* sum) {
    for (int i = 0; i < n; i += kLanes) {
        for (int k = 0; k < kLanes / kWidth; ++k) {
            const Doubles part = load_lanes(x + i + k * kWidth);
            sum->lane[k] = sum->lane[k] + part * part;
        }
    }
}
template <class Real>
static inline void add_sizes(const Real* x, int n, Lanes* sum) {
    Real size[kLanes];
    for (int i = 0; i < n; i += kLanes) {
        for (int k = 0; k < kLanes; ++k) size[k] = x[i + k] < 0 ? -x[i + k] : x[i + k];
        for (int k = 0; k < kLanes / kWidth; ++k) sum->lane[k] = sum->lane[k] + load_lanes(size + k * kWidth);
    }
}
static inline double total(const Lanes& sum) {
    double lanes[kLanes], result = 0;
    for (int k = 0; k < kLanes / kWidth; ++k) store_lanes(sum.lane[k], lanes + k * kWidth);
    for (int k = 0; k < kLanes; ++k) result += lanes[k];
    return result;
}

static uint64_t word_sum(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    uint64_t sum = 0;
    const int64_t words = bytes / 8;
    for (int64_t i = 0; i < words; ++i) {
        uint64_t word;
        __builtin_memcpy(&word, at + 8 * i, 8);
        sum += word;
    }
    if (bytes % 8 != 0) {
        uint64_t word = 0;
        __builtin_memcpy(&word, at + 8 * words, size_t(bytes % 8));
        sum += word;
    }
    return sum;
}

// ---- what a place in the order holds

// Bit i: the entry with keys[i] at index i + first of the order is held.
template <class Key>
static inline uint32_t held(const Key* key, const Bound<Key>& bound, int64_t first) {
    const int64_t through = bound.index + 1 - first;  // so many of the group lie at or before the index
    if (through <= 0) return at_least(key, Key(bound.key + 1));
    if (through >= kGroup) return at_least(key, bound.key);
    const uint32_t before = (uint32_t(1) << through) - 1;
    return (at_least(key, bound.key) & before) | (at_least(key, Key(bound.key + 1)) & ~before);
}

// Writes the elements whose bit is set, one after the other. May write up to kGroup elements from `out` on: a
// compressed vector is stored whole, because compressing stores are slow (over 100 cycles on Zen 4).
template <class T>
static inline __attribute__((always_inline)) void put_kept(uint32_t mask, const T* group, T* out) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const __mmask16 low = __mmask16(mask), high = __mmask16(mask >> 16);
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(low, _mm512_loadu_si512(group)));
        _mm512_storeu_si512(out + __builtin_popcount(low),
                            _mm512_maskz_compress_epi32(high, _mm512_loadu_si512(group + 16)));
    } else {
        for (int part = 0; part < 4; ++part) {
            const __mmask8 eight = __mmask8(mask >> (8 * part));
            _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(eight, _mm512_loadu_si512(group + 8 * part)));
            out += __builtin_popcount(eight);
        }
    }
#else
    for (; mask != 0; mask &= mask - 1) *out++ = group[__builtin_ctz(mask)];
#endif
}

// ---- collect

template <class Real, class Key>
static void collect_part(StreamChunk& chunk, int64_t begin, int64_t end) {
    constexpr int kShift = int(sizeof(Key)) * 8 - 16;
    const Bound<Key> edge = {Key(chunk.edge_key), chunk.edge_index};
    Lanes squares = {}, effects = {};
    int32_t* offsets = chunk.offsets;
    Real* values = static_cast<Real*>(chunk.values);
    Real* scores = static_cast<Real*>(chunk.scores);
    Real value[kBlock], other[kBlock];
    Key key[kBlock];
    int32_t offset[kGroup];
    for (int64_t start = begin; start < end; start += kBlock) {
        const int n = int(end - start < kBlock ? end - start : kBlock);
        const int whole = (n + kGroup - 1) / kGroup * kGroup;
        load_block(chunk.tuned, DType(chunk.tuned_dtype), start, n, value);
        if (chunk.base != nullptr) {
            load_block(chunk.base, DType(chunk.base_dtype), start, n, other);
            for (int i = 0; i < n; ++i) value[i] = sub_rn(value[i], other[i]);
        }
        Key bad = 0;
        for (int i = 0; i < n; ++i) {
            score_key(value[i], &key[i]);
            bad += Key(key[i] >= KeyTraits<Key>::infinity);
        }
        chunk.bad_values += int64_t(bad);
        for (int i = 0; i < n; ++i) ++chunk.histogram[key[i] >> kShift];
        for (int i = n; i < whole; ++i) {
            value[i] = 0;
            key[i] = 0;  // below every entry's
        }
        add_squares(value, whole, &squares);
        if (chunk.importance != nullptr) {
            load_block(chunk.importance, DType(chunk.importance_dtype), start, n, other);
            Key bad_weights = 0, bad_scores = 0;
            for (int i = 0; i < n; ++i) {
                Key weight;
                score_key(other[i], &weight);
                bad_weights += Key((weight >= KeyTraits<Key>::infinity) | !(other[i] >= Real(0)));
                other[i] = mul_rn(value[i], other[i]);
                Key score;
                score_key(other[i], &score);
                bad_scores += Key(score >= KeyTraits<Key>::infinity);
                key[i] = chunk.by_score ? score : key[i];
            }
            chunk.bad_weights += int64_t(bad_weights);
            chunk.bad_scores += int64_t(bad_scores);
            for (int i = n; i < whole; ++i) other[i] = 0;
            add_sizes(other, whole, &effects);
        }
        for (int i = 0; i < n; i += kGroup) {
            const uint32_t mask = held(key + i, edge, start + i);
            if (mask == 0) continue;
            for (int k = 0; k < kGroup; ++k) offset[k] = int32_t(start) + i + k;
            put_kept(mask, offset, offsets + chunk.kept);
            put_kept(mask, value + i, values + chunk.kept);
            if (chunk.importance != nullptr) put_kept(mask, other + i, scores + chunk.kept);
            chunk.kept += __builtin_popcount(mask);
        }
    }
    if (chunk.base != nullptr) {
        const int64_t size = dtype_size(DType(chunk.base_dtype));  // parts begin at whole words
        chunk.word_sum += word_sum(static_cast<const char*>(chunk.base) + begin * size, (end - begin) * size);
    }
    chunk.energy += total(squares);
    chunk.effect += total(effects);
}

template <class Real, class Key>
static void collect_as(StreamChunk& chunk) {
    chunk.kept = chunk.bad_values = chunk.bad_weights = chunk.bad_scores = 0;
    chunk.energy = chunk.effect = 0;
    chunk.word_sum = 0;
    for (int64_t begin = 0; begin < chunk.n; begin += kPart)
        collect_part<Real, Key>(chunk, begin, begin + kPart < chunk.n ? begin + kPart : chunk.n);
}

static void collect(StreamChunk& chunk) {
    if (chunk.wide) return collect_as<double, uint64_t>(chunk);
    if (chunk.wide_keys) return collect_as<float, uint64_t>(chunk);
    return collect_as<float, uint32_t>(chunk);
}

// ---- entries that were kept

// Calls body(place, keys, number of them) for groups of scores; the keys of the last one are padded with 0.
template <class Key, class Real, class Body>
static inline __attribute__((always_inline)) void for_each_group(const Real* scores, int64_t n, const Body& body) {
    Key key[kGroup];
    for (int64_t start = 0; start < n; start += kGroup) {
        const int count = int(n - start < kGroup ? n - start : kGroup);
        for (int i = 0; i < count; ++i) score_key(scores[start + i], &key[i]);
        for (int i = count; i < kGroup; ++i) key[i] = 0;
        body(start, key, count);
    }
}

// Calls body(scores, a key) with their types.
template <class Body>
static inline void with_scores(const void* scores, int wide, int wide_keys, const Body& body) {
    if (wide) return body(static_cast<const double*>(scores), uint64_t());
    if (wide_keys) return body(static_cast<const float*>(scores), uint64_t());
    return body(static_cast<const float*>(scores), uint32_t());
}

// Calls body(place of a group, mask of those held) for the groups of some entries that hold any.
template <class Real, class Key, class Body>
static inline __attribute__((always_inline)) void for_each_held(const StreamEntries& entries, const Body& body) {
    int64_t through = 0;  // offsets ascend, so the index becomes a place among them
    for (int64_t left = entries.n; left > 0;) {
        const int64_t half = left / 2;
        const bool before = entries.offsets[through + half] <= entries.index;
        through = before ? through + half + 1 : through;
        left = before ? left - half - 1 : half;
    }
    const Bound<Key> bound = {Key(entries.key), through - 1};
    for_each_group<Key>(static_cast<const Real*>(entries.scores), entries.n,
                        [&](int64_t start, const Key* group, int count) {
                            uint32_t mask = held(group, bound, start);
                            if (count < kGroup) mask &= (uint32_t(1) << count) - 1;
                            if (mask != 0) body(start, mask, count);
                        });
}

// Whole groups, and those at the end padded with zeros.
template <class T>
static inline const T* whole_group(const T* at, int count, T* padded) {
    if (count == kGroup) return at;
    for (int i = 0; i < kGroup; ++i) padded[i] = i < count ? at[i] : T(0);
    return padded;
}

static inline int gap_length(uint64_t gap) { return gap < 128 ? 1 : (63 - __builtin_clzll(gap)) / 7 + 1; }

// The bytes of the gaps between n ascending places; none before the first.
template <class Int>
static int64_t bytes_between(const Int* places, int64_t n) {
    int64_t longer = 0;  // the usual block has gaps below 128 only: one byte each, a loop that vectorises
    for (int64_t i = 1; i < n; ++i) longer += places[i] - places[i - 1] > 128;
    if (longer == 0) return n > 0 ? n - 1 : 0;
    int64_t bytes = 0;
    for (int64_t i = 1; i < n; ++i) bytes += gap_length(uint64_t(places[i] - places[i - 1] - 1));
    return bytes;
}

template <class Real, class Key>
static void measure_as(const StreamEntries& entries, StreamMeasure& found) {
    const Real* values = static_cast<const Real*>(entries.values);
    const Real* effects = static_cast<const Real*>(entries.effects);
    Lanes squares = {}, sizes = {};
    // What is held is moved together into blocks; the last place of the block before stands in front of the places.
    int32_t offset[1 + kBlock + kGroup];
    Real value[kBlock + kGroup], effect[kBlock + kGroup], padded[kGroup];
    int32_t last_offsets[kGroup];
    int filled = 0;
    const auto flush = [&] {
        if (filled == 0) return;
        for (int i = filled; i < filled + kLanes; ++i) value[i] = effect[i] = 0;
        const int whole = (filled + kLanes - 1) / kLanes * kLanes;
        add_squares(value, whole, &squares);
        if (effects != nullptr) add_sizes(effect, whole, &sizes);
        const bool first = found.held == 0;
        if (first) found.first = entries.first + offset[1];
        found.gap_bytes += bytes_between(offset + first, filled + 1 - first);
        found.held += filled;
        offset[0] = offset[filled];
        filled = 0;
    };
    found = {};
    for_each_held<Real, Key>(entries, [&](int64_t start, uint32_t mask, int count) {
        put_kept(mask, whole_group(entries.offsets + start, count, last_offsets), offset + 1 + filled);
        put_kept(mask, whole_group(values + start, count, padded), value + filled);
        if (effects != nullptr) put_kept(mask, whole_group(effects + start, count, padded), effect + filled);
        filled += __builtin_popcount(mask);
        if (filled > kBlock - kGroup) flush();
    });
    flush();
    found.last = found.held > 0 ? entries.first + offset[0] : -1;
    found.energy = total(squares);
    found.effect = total(sizes);
}

static void measure(const StreamEntries& entries, StreamMeasure& found) {
    with_scores(entries.scores, entries.wide, entries.wide_keys, [&](auto* ranked, auto key) {
        measure_as<std::remove_const_t<std::remove_pointer_t<decltype(ranked)>>, decltype(key)>(entries, found);
    });
}

static int64_t keep(const StreamEntries& entries, int64_t* positions, void* values) {
    int64_t kept = 0;
    with_scores(entries.scores, entries.wide, entries.wide_keys, [&](auto* ranked, auto key) {
        using Real = std::remove_const_t<std::remove_pointer_t<decltype(ranked)>>;
        const Real* from = static_cast<const Real*>(entries.values);
        Real* to = static_cast<Real*>(values);
        for_each_held<Real, decltype(key)>(entries, [&](int64_t start, uint32_t mask, int count) {
            int64_t position[kGroup];
            Real padded[kGroup];
            for (int i = 0; i < count; ++i) position[i] = entries.first + entries.offsets[start + i];
            put_kept(mask, position, positions + kept);
            put_kept(mask, whole_group(from + start, count, padded), to + kept);
            kept += __builtin_popcount(mask);
        });
    });
    return kept;
}

static void add_digits(const void* scores, int64_t n, int wide, int wide_keys, uint64_t prefix, int round,
                       int64_t* histogram) {
    with_scores(scores, wide, wide_keys, [&](auto* ranked, auto k) {
        using Key = decltype(k);
        const int shift = int(sizeof(Key)) * 8 - 16 - 16 * round;
        const Key low = Key(prefix), last = Key(low | ((uint64_t(1) << (shift + 16 < 63 ? shift + 16 : 63)) - 1));
        for_each_group<Key>(ranked, n, [&](int64_t, const Key* group, int count) {
            uint32_t mask = count < kGroup ? (uint32_t(1) << count) - 1 : ~uint32_t(0);
            if (round > 0) mask &= at_least(group, low) & ~at_least(group, Key(last + 1));
            for (; mask != 0; mask &= mask - 1) ++histogram[(group[__builtin_ctz(mask)] >> shift) & 0xffff];
        });
    });
}

static int64_t find_ties(const void* scores, int64_t n, int wide, int wide_keys, uint64_t key, int64_t most,
                         int64_t* place) {
    int64_t found = 0;
    *place = -1;
    with_scores(scores, wide, wide_keys, [&](auto* ranked, auto k) {
        using Key = decltype(k);
        for_each_group<Key>(ranked, n, [&](int64_t start, const Key* group, int) {
            for (uint32_t mask = at_least(group, Key(key)) & ~at_least(group, Key(key + 1)); mask != 0 && found < most;
                 mask &= mask - 1) {
                ++found;
                *place = start + __builtin_ctz(mask);
            }
        });
    });
    return found;
}

// ---- gaps

static int64_t gap_bytes(const int64_t* positions, int64_t n, int64_t previous) {
    return n == 0 ? 0 : gap_length(uint64_t(positions[0] - previous - 1)) + bytes_between(positions, n);
}

static int64_t encode_gaps(const int64_t* positions, int64_t n, int64_t previous, uint8_t* out) {
    const uint8_t* begin = out;
    const auto encode = [&](int64_t position) {
        uint64_t gap = uint64_t(position - previous - 1);
        previous = position;
        for (; gap >= 128; gap >>= 7) *out++ = uint8_t(gap | 128);
        *out++ = uint8_t(gap);
    };
    int64_t i = 0;
    if (n > 0) encode(positions[i++]);
    for (; i + kGroup <= n; i += kGroup) {  // a group of short gaps at once, in loops that vectorise
        uint64_t any = 0;
        for (int k = 0; k < kGroup; ++k) any |= uint64_t(positions[i + k] - positions[i + k - 1] - 1);
        if (any < 128) {
            for (int k = 0; k < kGroup; ++k) out[k] = uint8_t(positions[i + k] - positions[i + k - 1] - 1);
            out += kGroup;
            previous = positions[i + kGroup - 1];
        } else {
            for (int k = 0; k < kGroup; ++k) encode(positions[i + k]);
        }
    }
    for (; i < n; ++i) encode(positions[i]);
    return out - begin;
}

static int64_t decode_gaps(const uint8_t* bytes, int64_t n, int64_t most, int64_t previous, int64_t numel,
                           int64_t* positions, int64_t* used, int* inside) {
    uint64_t last = uint64_t(previous), out_of_range = 0;
    int64_t found = 0, at = 0, left = n;
    while (found < most && left > 0) {
        uint64_t eight;
        if (left >= 8 && most - found >= 8) {
            __builtin_memcpy(&eight, bytes + at, 8);
            if ((eight & 0x8080808080808080u) == 0) {  // eight short gaps at once
                for (int k = 0; k < 8; ++k) {
                    last += bytes[at + k] + uint64_t(1);
                    positions[found + k] = int64_t(last);
                    out_of_range |= uint64_t(last >= uint64_t(numel));
                }
                at += 8;
                left -= 8;
                found += 8;
                continue;
            }
        }
        uint64_t gap = 0;
        int length = 0;
        while (length < left && bytes[at + length] >= 128) {
            if (length == kMostGapBytes - 1) return -1;  // a last byte would be the eighth
            gap |= uint64_t(bytes[at + length] & 127) << (7 * length);
            ++length;
        }
        if (length == left) break;  // the rest is the beginning of another
        gap |= uint64_t(bytes[at + length]) << (7 * length);
        last += gap + 1;
        positions[found++] = int64_t(last);
        out_of_range |= uint64_t(last >= uint64_t(numel));
        at += length + 1;
        left -= length + 1;
    }
    *used = at;
    *inside = out_of_range == 0;
    return found;
}

// ---- bits

static void set_bits(const int64_t* positions, int64_t n, int64_t first, uint8_t* bitmap) {
    const auto set = [&](int64_t i) {
        const int64_t bit = positions[i] - first;
        bitmap[bit / 8] = uint8_t(bitmap[bit / 8] | (1u << (bit % 8)));
    };
    int64_t i = 0;
    if (n > 0 && positions[n - 1] - positions[0] == n - 1) {  // no gap: whole bytes, but for the ends
        for (; i < n && (positions[i] - first) % 8 != 0; ++i) set(i);
        const int64_t bytes = (n - i) / 8;
        if (bytes > 0) __builtin_memset(bitmap + (positions[i] - first) / 8, 0xff, size_t(bytes));
        i += 8 * bytes;
    }
    for (; i < n; ++i) set(i);
}

static inline uint64_t word_at(const uint8_t* bytes, int64_t at, int64_t n) {
    uint64_t word = 0;
    __builtin_memcpy(&word, bytes + at, size_t(n - at < 8 ? n - at : 8));
    return word;
}

static int64_t count_bits(const uint8_t* bitmap, int64_t bytes) {
    int64_t count = 0;
    for (int64_t at = 0; at < bytes; at += 8) count += __builtin_popcountll(word_at(bitmap, at, bytes));
    return count;
}

static void get_bits(const uint8_t* bitmap, int64_t bytes, int64_t first, int64_t* positions) {
    for (int64_t at = 0; at < bytes; at += 8)
        for (uint64_t word = word_at(bitmap, at, bytes); word != 0; word &= word - 1)
            *positions++ = first + 8 * at + __builtin_ctzll(word);
}

// ---- subtract

static inline void round_to(float x, float* out) { *out = x; }
static inline void round_to(float x, bf16_t* out) { store_element(x, out); }
static inline void round_to(float x, f16_t* out) { store_element(x, out); }
static inline void round_to(double x, double* out) { *out = x; }
static inline void round_to(double x, float* out) { *out = float(x); }
static inline void round_to(double x, bf16_t* out) { store_element(float(x), out); }  // by way of fp32, as torch
static inline void round_to(double x, f16_t* out) { store_element(float(x), out); }

static inline float magnitude_of(float x) { return __builtin_fabsf(x); }
static inline double magnitude_of(double x) { return __builtin_fabs(x); }

// Gathered into blocks, edited there by vectors, put back.
template <class Real, class T, class V>
static void subtract_part(StreamSubtraction& edit, int64_t begin, int64_t end) {
    T* elements = static_cast<T*>(edit.elements) - edit.first;
    T* before = static_cast<T*>(edit.before);
    const V* values = static_cast<const V*>(edit.values);
    const Real scale = Real(edit.scale);
    Lanes requested = {}, effective = {};
    Real old[kBlock], moved[kBlock];
    double wished[kBlock], size[kBlock];
    T rounded[kBlock];
    V smallest[kLanes];
    for (int k = 0; k < kLanes; ++k) smallest[k] = V(__builtin_inf());
    for (int64_t start = begin; start < end; start += kBlock) {
        const int n = int(end - start < kBlock ? end - start : kBlock);
        const int whole = (n + kLanes - 1) / kLanes * kLanes;
        for (int i = 0; i < n; ++i) before[start + i] = elements[edit.positions[start + i]];
        load_block(before + start, n, old);
        for (int i = 0; i < n; ++i) {
            wished[i] = double(values[start + i]) * edit.scale;
            round_to(sub_rn(old[i], mul_rn(scale, Real(values[start + i]))), &rounded[i]);
        }
        load_block(rounded, n, moved);
        int64_t same = 0;
        for (int i = 0; i < n; ++i) {
            same += moved[i] == old[i];
            size[i] = double(moved[i]) - double(old[i]);
        }
        edit.unchanged += same;
        for (int i = 0; i < n; ++i) elements[edit.positions[start + i]] = rounded[i];
        for (int i = n; i < whole; ++i) wished[i] = size[i] = 0;
        add_squares(wished, whole, &requested);
        add_squares(size, whole, &effective);
        const auto look = [&](int i, int k) {
            const V magnitude = magnitude_of(values[start + i + k]);
            smallest[k] = magnitude < smallest[k] ? magnitude : smallest[k];
        };
        int i = 0;
        for (; i + kLanes <= n; i += kLanes)
            for (int k = 0; k < kLanes; ++k) look(i, k);
        for (int k = 0; i + k < n; ++k) look(i, k);
    }
    edit.requested += total(requested);
    edit.effective += total(effective);
    for (int k = 0; k < kLanes; ++k) edit.smallest = smallest[k] < edit.smallest ? double(smallest[k]) : edit.smallest;
}

// fp64 throughout where the elements or the values are.
template <class T>
static void subtract_as(StreamSubtraction& edit) {
    edit.unchanged = 0;
    edit.requested = edit.effective = 0;
    edit.smallest = __builtin_inf();
    for (int64_t begin = 0; begin < edit.n; begin += kPart) {
        const int64_t end = begin + kPart < edit.n ? begin + kPart : edit.n;
        if (edit.wide_values)
            subtract_part<double, T, double>(edit, begin, end);
        else if constexpr (sizeof(T) == 8)
            subtract_part<double, T, float>(edit, begin, end);
        else
            subtract_part<float, T, float>(edit, begin, end);
    }
}

static void subtract(StreamSubtraction& edit) {
    switch (DType(edit.dtype)) {
        case DType::f32: return subtract_as<float>(edit);
        case DType::f64: return subtract_as<double>(edit);
        case DType::f16: return subtract_as<f16_t>(edit);
        case DType::bf16: return subtract_as<bf16_t>(edit);
    }
}

template <class Real>
static double sum_squares_as(const Real* values, int64_t n) {
    Lanes sum = {};
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t at = 0; at < whole; at += kBlock)
        add_squares(values + at, int(whole - at < kBlock ? whole - at : kBlock), &sum);
    Real rest[kLanes] = {};
    for (int64_t i = whole; i < n; ++i) rest[i - whole] = values[i];
    add_squares(rest, kLanes, &sum);
    return total(sum);
}

static double sum_squares(const void* values, int wide, int64_t n) {
    if (wide) return sum_squares_as(static_cast<const double*>(values), n);
    return sum_squares_as(static_cast<const float*>(values), n);
}

template <class Bits>
static int finite_bits(const void* data, Bits exponent, int64_t n) {
    const char* at = static_cast<const char*>(data);
    Bits bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        Bits bits;
        __builtin_memcpy(&bits, at + i * int64_t(sizeof(Bits)), sizeof(Bits));
        bad |= Bits((bits & exponent) == exponent);
    }
    return bad == 0;
}

static int all_finite(const void* data, int dtype, int64_t n) {
    switch (DType(dtype)) {
        case DType::f32: return finite_bits<uint32_t>(data, 0x7f800000u, n);
        case DType::f64: return finite_bits<uint64_t>(data, 0x7ff0000000000000u, n);
        case DType::f16: return finite_bits<uint16_t>(data, 0x7c00u, n);
        case DType::bf16: return finite_bits<uint16_t>(data, 0x7f80u, n);
    }
    return 0;
}

extern const StreamKernels stream_kernels;
const StreamKernels stream_kernels = {collect,    subtract,  measure,     keep,        add_digits,
                                      find_ties,  gap_bytes, encode_gaps, decode_gaps, set_bits,
                                      count_bits, get_bits,  word_sum,    sum_squares, all_finite};

}  // namespace PSE_ISA
}  // namespace pse
