// The inner loops of a harm vector that is read and written piece by piece: what crosses the border (stream.cpp).
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace pse {

// One chunk of a tensor that is looked at once. Buffers have room for 32 more than n elements.
struct StreamChunk {
    const void *base, *tuned;  // base may be null: tuned holds the differences
    const void* importance;    // may be null
    int by_score;              // entries are ranked by |difference * importance|, not by |difference|
    int base_dtype, tuned_dtype, importance_dtype;
    int64_t n;              // below 2^31
    int wide;               // differences are float64
    int wide_keys;          // keys are those of float64, of the histogram and of the edge
    uint64_t edge_key;      // kept: larger keys, and this one up to edge_index, which counts from the chunk's start
    int64_t edge_index;     // at most 2^62
    int64_t* histogram;     // [65536], the differences' magnitudes are added: the upper 16 bits of their keys
    int32_t* offsets;       // of the kept, ascending
    void *values, *scores;  // of the kept: differences, and those times importance where there is one
    // Found. Sums are added in a fixed order: the same bits for every instruction set.
    int64_t kept, bad_values, bad_weights, bad_scores;  // bad: not finite; weights also: negative
    double energy, effect;                              // of squared differences; of |difference * importance|
    uint64_t word_sum;                                  // of base, see word_sum below
};

// Entries that collect kept, some of which a cut holds.
struct StreamEntries {
    const int32_t* offsets;       // ascending, from the element `first`
    const void *values, *scores;  // what is written, and what it is ranked by: one type
    const void* effects;          // may be null
    int64_t first, n;
    int wide, wide_keys;  // as above
    uint64_t key;         // held: larger keys, and this one up to index, which counts from `first`
    int64_t index;
};

// Of those that a cut holds.
struct StreamMeasure {
    int64_t held, first, last;  // number; the first and the last position
    int64_t gap_bytes;          // from the first to the last: the gap before the first is not in it
    double energy, effect;      // the sums of squared values and of |effects|
};

// Kept entries of one tensor, subtracted from a chunk of it.
struct StreamSubtraction {
    void* elements;
    int dtype;
    const int64_t* positions;  // ascending, all inside the chunk
    int64_t first;             // the chunk's first element
    const void* values;
    int wide_values;  // values are float64
    int64_t n;
    double scale;
    void* before;                 // [n] of the elements' dtype: what was overwritten
    int64_t unchanged;            // found: rounded to what they were
    double requested, effective;  // squared norms of the edit, as computed and as rounded
    double smallest;              // magnitude of a value
};

struct StreamKernels {
    void (*collect)(StreamChunk& chunk);
    void (*subtract)(StreamSubtraction& edit);

    void (*measure)(const StreamEntries& entries, StreamMeasure& found);
    // Copies those that are held and returns their number. Outputs have room for n rounded up to 32.
    int64_t (*keep)(const StreamEntries& entries, int64_t* positions, void* values);
    // Adds to histogram[65536] the digit of 16 bits below the settled ones of every key (topm.h).
    void (*add_digits)(const void* scores, int64_t n, int wide, int wide_keys, uint64_t prefix, int round,
                       int64_t* histogram);
    // How many scores have this key, up to `most` of them; *place is where the last of these is, or -1.
    int64_t (*find_ties)(const void* scores, int64_t n, int wide, int wide_keys, uint64_t key, int64_t most,
                         int64_t* place);

    // Positions as LEB128 gaps (docs/harm_vector.md). encode returns the bytes written, at most 7 each. decode takes at
    // most `most` gaps out of n bytes and returns their number, or -1 where one has more than 7 bytes; *used is where
    // the next one begins. *inside: no position is at or above numel.
    int64_t (*gap_bytes)(const int64_t* positions, int64_t n, int64_t previous);
    int64_t (*encode_gaps)(const int64_t* positions, int64_t n, int64_t previous, uint8_t* out);
    int64_t (*decode_gaps)(const uint8_t* bytes, int64_t n, int64_t most, int64_t previous, int64_t numel,
                           int64_t* positions, int64_t* used, int* inside);

    // Positions as bits, the lowest first; `first` is the element of the first bit.
    void (*set_bits)(const int64_t* positions, int64_t n, int64_t first, uint8_t* bitmap);
    int64_t (*count_bits)(const uint8_t* bitmap, int64_t bytes);
    void (*get_bits)(const uint8_t* bitmap, int64_t bytes, int64_t first, int64_t* positions);

    // The sum of the 64-bit words modulo 2^64, the last one filled up with zeros.
    uint64_t (*word_sum)(const void* data, int64_t bytes);
    double (*sum_squares)(const void* values, int wide, int64_t n);  // of float32, or float64 where wide
    int (*all_finite)(const void* data, int dtype, int64_t n);
};

}  // namespace pse
