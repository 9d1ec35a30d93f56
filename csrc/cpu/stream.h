// The inner loops of a harm vector that is read and written piece by piece: what crosses the border (stream.cpp).
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace pse {

// One chunk of a tensor that is looked at once. Buffers have room for n elements, rounded up to 32.
struct StreamChunk {
    const void *base, *tuned, *importance;  // importance may be null: entries are then ranked by |difference|
    int base_dtype, tuned_dtype, importance_dtype;
    int64_t n;              // below 2^31
    int wide;               // differences are float64
    int wide_keys;          // keys are those of float64, of the histogram and of the edge
    uint64_t edge_key;      // kept: larger keys, and this one up to edge_index, which counts from the chunk's start
    int64_t edge_index;     // at most 2^62
    int64_t* histogram;     // [65536], the differences' magnitudes are added: the upper 16 bits of their keys
    int32_t* offsets;       // of the kept, ascending
    void *values, *scores;  // of the kept; scores is unused without importance
    void* scratch;          // scratch_bytes()
    int threads;
    // Found. The energy is added in a fixed order: the same bits for every thread count and instruction set.
    int64_t kept, bad_values, bad_weights, bad_scores;  // bad: not finite; weights also: negative
    double energy;                                      // the sum of squared differences
    uint64_t word_sum;                                  // of base, see word_sum below
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
    void* before;   // [n] of the elements' dtype: what was overwritten
    void* scratch;  // scratch_bytes()
    int threads;
    int64_t unchanged;            // found: rounded to what they were
    double requested, effective;  // squared norms of the edit, as computed and as rounded
    double smallest;              // magnitude of a value
};

struct StreamKernels {
    int64_t (*scratch_bytes)(int64_t n, int threads);
    void (*collect)(StreamChunk& chunk);
    void (*subtract)(StreamSubtraction& edit);

    // Of entries that collect kept, n ascending offsets from the element `first`, those that (key, index) holds, index
    // counted from `first`; returns their number. Outputs have room for n rounded up to 32.
    int64_t (*keep)(const int32_t* offsets, int64_t first, const void* values, const void* scores, int64_t n, int wide,
                    int wide_keys, uint64_t key, int64_t index, int64_t* kept_positions, void* kept_values);
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
    int (*all_finite)(const void* data, int dtype, int64_t n);
};

}  // namespace pse
