// The integer by which top-m ranks an entry, and the total order (key descending, flat index ascending).
// Law: key(a) < key(b) <=> |a| < |b| for numbers; key(-0) == key(0) == 1; 0 is kept for entries that may not be
// selected. Keys stay below the sign bit of their type, so signed and unsigned comparisons agree.
#pragma once
#include "core/arithmetic.h"

namespace pse {
namespace PSE_ISA {

template <class Key>
struct KeyTraits;
template <>
struct KeyTraits<uint32_t> {
    static constexpr uint32_t infinity = 0x7f800001u;
    static constexpr uint32_t none = 0x7fffffffu;  // above every key: "at least none" selects nothing
    static constexpr int bits = 31;
};
template <>
struct KeyTraits<uint64_t> {
    static constexpr uint64_t infinity = 0x7ff0000000000001u;
    static constexpr uint64_t none = 0x7fffffffffffffffu;
    static constexpr int bits = 63;
};

PSE_HD void score_key(float score, uint32_t* key) { *key = (float_bits(score) & 0x7fffffffu) + 1u; }
PSE_HD void score_key(double score, uint64_t* key) { *key = (double_bits(score) & 0x7fffffffffffffffu) + 1u; }
PSE_HD void score_key(float score, uint64_t* key) { score_key(double(score), key); }  // widening is exact

PSE_HD double key_score(uint32_t key) { return double(bits_float(key - 1u)); }
PSE_HD double key_score(uint64_t key) { return bits_double(key - 1u); }

// The key of an entry: |delta|, eligible where delta is finite.
template <class Real, class Key>
PSE_HD Key entry_key(Real delta) {
    Key key;
    score_key(delta, &key);
    return key < KeyTraits<Key>::infinity ? key : Key(0);
}

// With importance: |fl(delta * importance)|, eligible where delta is finite and importance is finite and >= 0.
// The product of two finite numbers is never NaN; where it overflows, infinity ranks highest.
template <class Real, class Key>
PSE_HD Key entry_key(Real delta, Real importance) {
    Key key, size, weight;
    score_key(mul_rn(delta, importance), &key);
    score_key(delta, &size);
    score_key(importance, &weight);
    const bool eligible =
        (size < KeyTraits<Key>::infinity) & (weight < KeyTraits<Key>::infinity) & (importance >= Real(0));
    return eligible ? key : Key(0);
}

// A place in the order: it holds every entry with a larger key, and with an equal key up to the index (inclusive).
template <class Key>
struct Bound {
    Key key;
    int64_t index;

    PSE_HD bool holds(Key k, int64_t i) const { return k > key || (k == key && i <= index); }
    // Entries of [i, limit_end) are held <=> their key is at least limit(i): no index is compared inside the loops.
    PSE_HD Key limit(int64_t i) const { return i <= index ? key : Key(key + 1); }
    PSE_HD int64_t limit_end(int64_t i, int64_t end) const { return i <= index && index + 1 < end ? index + 1 : end; }
};
template <class Key>
PSE_HD Bound<Key> nothing() {
    return {Key(KeyTraits<Key>::none - 1), -1};
}
template <class Key>
PSE_HD Bound<Key> everything() {
    return {Key(0), -1};
}

}  // namespace PSE_ISA
}  // namespace pse
