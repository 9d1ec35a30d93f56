// Guided sampling: one token per row from integer weights.
// Bytes  every row's logits are read once from memory; all later passes run over z, which a core's L2 cache holds.
// Story  1 combine: z = base + sum w_g * guide_g, block maxima, bad values   2 weights: masses of chunks
//        3 filters: thresholds by histograms, never by a sort                4 draw: mulhi64(word, mass), find the
//        token
// Order  every sum is an integer: any split over threads gives the same token.
// With at least as many rows as threads a row is one thread's; the rest of the rows are split over all threads.
#include "cpu/sampling.h"

#include "core/guided.h"
#include "core/philox.h"
#include "core/sampling_weight.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pse {
namespace PSE_ISA {

constexpr int64_t kChunk = 4096;  // tokens per task and per partial mass
constexpr int64_t kBlock = 64;    // tokens per maximum: what a filter can skip
constexpr int kBins = 1024;       // 64 octaves of weight, 1/16 octave each; then 10 bits of key at a time
constexpr int kCopies = 4;        // histogram copies, so that neighbours in one bin do not wait for each other

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- scratch of one row

struct Scratch {
    float* z;              // [vocab, padded to a chunk with -inf]
    float* candidates;     // [2 * vocab, padded]: a set and what is collected from it
    int32_t* block_best;   // [vocab / kBlock] keys
    uint64_t* chunk_mass;  // [vocab / kChunk]
    uint64_t* histograms;  // [threads, kCopies, kBins]
};

static inline int64_t padded(int64_t vocab) { return ceil_div(vocab, kChunk) * kChunk; }

static inline int64_t row_bytes(int64_t vocab) {
    return padded(vocab) * 12 + padded(vocab) / kBlock * 4 + padded(vocab) / kChunk * 8;
}

static int64_t scratch_bytes(int64_t vocab, int threads) {
    return threads * (row_bytes(vocab) + int64_t(kCopies * kBins * 8));
}

static inline Scratch carve(void* memory, int64_t vocab, int slot, int threads) {
    char* at = static_cast<char*>(memory) + threads * int64_t(kCopies * kBins * 8) + slot * row_bytes(vocab);
    Scratch s;
    s.histograms = static_cast<uint64_t*>(memory) + slot * int64_t(kCopies * kBins);
    s.z = reinterpret_cast<float*>(at);
    s.candidates = s.z + padded(vocab);
    s.chunk_mass = reinterpret_cast<uint64_t*>(s.candidates + 2 * padded(vocab));
    s.block_best = reinterpret_cast<int32_t*>(s.chunk_mass + padded(vocab) / kChunk);
    return s;
}

// ---- 1. combine

// The logits of a chunk as fp32: in place where they are fp32, else converted into `buffer`.
static inline const float* as_float(const void* data, DType dtype, int64_t offset, int64_t n, float* buffer) {
    if (dtype == DType::f32) return static_cast<const float*>(data) + offset;
    load_block(data, dtype, offset, n, buffer);
    return buffer;
}

struct Extremes {
    int32_t best = kKeyOfMinusInfinity, worst = kKeyOfInfinity;
};

static inline bool has_nan(const Extremes& e) { return e.best > kKeyOfInfinity || e.worst < kKeyOfMinusInfinity; }

// One block of z. Keys order NaNs outside [-inf, +inf], so the two extremes reveal every bad value.
template <class Combine>
static inline Extremes combine_block(int64_t start, int64_t count, float* __restrict z, const Combine& combine) {
    int32_t best = INT32_MIN, worst = INT32_MAX;
    for (int64_t i = start; i < start + count; ++i) {
        const float value = add_rn(combine(i), 0.0f);  // -0 and +0 are one key
        const int32_t key = key_of(value);
        z[i] = value;
        best = key > best ? key : best;
        worst = key < worst ? key : worst;
    }
    return {best, worst};
}

// z of a chunk with the maximum key of every block. `quick` differs from `careful` only where it gives NaN.
template <class Quick, class Careful>
static inline Extremes combine_blocks(int64_t n, float* __restrict z, int32_t* __restrict block_best,
                                      const Quick& quick, const Careful& careful) {
    Extremes all;
    for (int64_t block = 0; block < kChunk / kBlock; ++block) {
        const int64_t start = block * kBlock, count = smaller(kBlock, n - start);
        Extremes e = {kKeyOfMinusInfinity, kKeyOfMinusInfinity};
        if (count == kBlock) {
            e = combine_block(start, kBlock, z, quick);
            if (has_nan(e)) e = combine_block(start, kBlock, z, careful);
        } else {
            if (count > 0) e = combine_block(start, count, z, careful);
            for (int64_t i = start + (count > 0 ? count : 0); i < start + kBlock; ++i) z[i] = kMinusInfinity;
        }
        block_best[block] = e.best;
        all.best = e.best > all.best ? e.best : all.best;
        all.worst = e.worst < all.worst ? e.worst : all.worst;
    }
    return all;
}

static inline Extremes combine_chunk(const LogitsArgs& a, const float* guidance, int64_t guidance_stride, int64_t row,
                                     int64_t start, int64_t n, float* z, int32_t* block_best) {
    float base_buffer[kChunk], guide_buffer[kChunk];
    const float* base = as_float(a.base, a.base_dtype, row * a.base_stride + start, n, base_buffer);
    const float* last = nullptr;
    float last_w = 0.0f;
    for (int64_t guide = 0; guide < a.guides; ++guide) {
        const float w = guidance[guide * guidance_stride];
        if (w == 0.0f) continue;  // not read: 0 * -inf would be NaN
        if (last != nullptr) {    // the guide before: its sum becomes the base of the next
            for (int64_t i = 0; i < n; ++i) base_buffer[i] = guided(base[i], last[i], last_w);
            base = base_buffer;
        }
        const int64_t offset = guide * a.guide_stride + row * a.guide_row_stride + start;
        last = as_float(a.guide, a.guide_dtype, offset, n, guide_buffer);
        last_w = w;
    }
    if (last == nullptr) {
        const auto alone = [=](int64_t i) { return base[i]; };
        return combine_blocks(n, z, block_best, alone, alone);
    }
    const auto sum = [=](int64_t i) { return add_rn(base[i], mul_rn(last_w, last[i])); };
    const auto toward = [=](int64_t i) { return guided_toward(base[i], last[i], last_w); };
    const auto away = [=](int64_t i) { return guided_away(base[i], last[i], last_w); };
    return last_w > 0.0f ? combine_blocks(n, z, block_best, sum, toward) : combine_blocks(n, z, block_best, away, away);
}

static inline bool has_distribution(const Extremes& e) {
    return e.best > kKeyOfMinusInfinity && e.best < kKeyOfInfinity && e.worst >= kKeyOfMinusInfinity;
}

// Fills z and block maxima of a row.
static inline Extremes combine_row(const LogitsArgs& a, const float* guidance, int64_t guidance_stride, int64_t row,
                                   const Scratch& s, int threads) {
    Extremes row_extremes;
    int32_t best = row_extremes.best, worst = row_extremes.worst;
    parallel_for(padded(a.vocab) / kChunk, threads, [&](int64_t chunk) {
        const int64_t start = chunk * kChunk, n = smaller(kChunk, a.vocab - start);
        const Extremes e =
            combine_chunk(a, guidance, guidance_stride, row, start, n, s.z + start, s.block_best + start / kBlock);
        for (int32_t seen = __atomic_load_n(&best, __ATOMIC_RELAXED);
             e.best > seen &&
             !__atomic_compare_exchange_n(&best, &seen, e.best, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
        }
        for (int32_t seen = __atomic_load_n(&worst, __ATOMIC_RELAXED);
             e.worst < seen &&
             !__atomic_compare_exchange_n(&worst, &seen, e.worst, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
        }
    });
    row_extremes.best = best;
    row_extremes.worst = worst;
    return row_extremes;
}

// ---- 2. weights

// The mass of a chunk. A block whose best weight is 0 (28 nats down: most of a peaked row) is skipped.
static inline uint64_t chunk_mass(const float* z, const int32_t* block_best, float best, float c) {
    uint64_t mass = 0;
    for (int64_t block = 0; block < kChunk / kBlock; ++block) {
        if (weight_of(float_of_key(block_best[block]), best, c) == 0) continue;
        for (int64_t i = 0; i < kBlock; ++i) mass += weight_of(z[block * kBlock + i], best, c);
    }
    return mass;
}

static inline uint64_t total(const uint64_t* values, int64_t n) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
}

static inline uint64_t row_mass(const Scratch& s, int64_t vocab, float best, float c, int threads) {
    const int64_t chunks = padded(vocab) / kChunk;
    parallel_for(chunks, threads, [&](int64_t chunk) {
        s.chunk_mass[chunk] = chunk_mass(s.z + chunk * kChunk, s.block_best + chunk * (kChunk / kBlock), best, c);
    });
    return total(s.chunk_mass, chunks);
}

// ---- 3. filters

// What a threshold search adds up: tokens (top-k) or their weights (top-p).
enum class Measure { count, mass };

static inline int bin_of_exponent(float y) { return int32_t(mul_rn(y, -16.0f)); }  // y in [-60, 0]: below kBins

static inline void sum_copies(uint64_t* histogram, int64_t copies) {
    for (int64_t copy = 1; copy < copies; ++copy)
        for (int bin = 0; bin < kBins; ++bin) histogram[bin] += histogram[copy * kBins + bin];
}

// Adds n values (a multiple of kBlock) to the four copies of a histogram over exponents of weight.
template <Measure measure>
static inline void exponent_histogram(const float* z, int64_t n, float best, float c, uint64_t* histogram) {
    for (int64_t start = 0; start < n; start += kBlock) {
        int32_t bin[kBlock];
        uint64_t weight[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            const float y = exponent_of(z[start + i], best, c);
            bin[i] = bin_of_exponent(y);
            if (measure == Measure::mass) weight[i] = weight_of_exponent(y);
        }
        for (int i = 0; i < kBlock; i += kCopies)
            for (int copy = 0; copy < kCopies; ++copy)
                histogram[copy * kBins + bin[i + copy]] += measure == Measure::mass ? weight[i + copy] : 1;
    }
}

// Appends the values of z (n, a multiple of 16) whose exponent lies in `bin`; returns how many.
static inline int64_t collect_bin(const float* z, int64_t n, float best, float c, int bin, float* out) {
    int64_t count = 0;
#if defined(__AVX512F__)
    const __m512 vbest = _mm512_set1_ps(best), vc = _mm512_set1_ps(c), floor = _mm512_set1_ps(-60.0f);
    const __m512 scale = _mm512_set1_ps(-16.0f);
    const __m512i vbin = _mm512_set1_epi32(bin);
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 value = _mm512_loadu_ps(z + i);
        const __m512 y = _mm512_max_ps(_mm512_mul_ps(_mm512_sub_ps(value, vbest), vc), floor);
        const __mmask16 in = _mm512_cmpeq_epi32_mask(_mm512_cvttps_epi32(_mm512_mul_ps(y, scale)), vbin);
        if (in != 0) {
            _mm512_mask_compressstoreu_ps(out + count, in, value);
            count += __builtin_popcount(in);
        }
    }
#else
    for (int64_t i = 0; i < n; ++i) {
        out[count] = z[i];
        count += bin_of_exponent(exponent_of(z[i], best, c)) == bin;
    }
#endif
    return count;
}

// The largest key such that the values with that key or a larger one measure at least `target` >= 1; values are
// reordered. Ten bits of the remaining key range per pass, so at most four passes.
template <Measure measure>
static inline int32_t refine(float* values, int64_t n, float best, float c, uint64_t target, uint64_t* histogram) {
    for (;;) {
        int32_t low = INT32_MAX, high = INT32_MIN;
        for (int64_t i = 0; i < n; ++i) {
            const int32_t key = key_of(values[i]);
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
        const uint32_t range = uint32_t(high) - uint32_t(low);
        if (range == 0) return high;
        int shift = 0;
        while ((range >> shift) >= uint32_t(kBins)) ++shift;
        for (int bin = 0; bin < kBins; ++bin) histogram[bin] = 0;
        for (int64_t i = 0; i < n; ++i)
            histogram[(uint32_t(high) - uint32_t(key_of(values[i]))) >> shift] +=
                measure == Measure::mass ? weight_of(values[i], best, c) : 1;
        uint32_t bin = 0;
        while (histogram[bin] < target) target -= histogram[bin++];
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const float value = values[i];
            if ((uint32_t(high) - uint32_t(key_of(value))) >> shift == bin) values[kept++] = value;
        }
        n = kept;
    }
}

// Walks a histogram from the best bin down to where `target` is reached; leaves in `target` what that bin must give.
static inline int boundary_bin(const uint64_t* histogram, uint64_t& target) {
    int bin = 0;
    while (histogram[bin] < target) target -= histogram[bin++];
    return bin;
}

// The candidates of one row's filters: all of z, or a subset in the order of the row that a filter cannot rule out.
struct Candidates {
    const float* values;
    int64_t n;  // padded with -inf to a multiple of kBlock
};

static inline int64_t pad_block(float* values, int64_t n) {
    while (n % kBlock != 0) values[n++] = kMinusInfinity;
    return n;
}

// Which of 16 values are at least `floor`, a bit each.
static inline uint32_t at_least(const float* z, float floor) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(z), _mm512_set1_ps(floor), _CMP_GE_OQ);
#elif defined(__SSE2__)
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i)
        mask |= uint32_t(_mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(z + 4 * i), _mm_set1_ps(floor)))) << (4 * i);
    return mask;
#else
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t(z[i] >= floor) << i;
    return mask;
#endif
}

// Appends the values of at least `floor` in order (n, a multiple of 16); returns how many. In place too: what is
// written never passes what was read. `out` has room for 16 more.
static inline int64_t append_at_least(const float* z, int64_t n, float floor, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
        uint32_t mask = at_least(z + i, floor);
#if defined(__AVX512F__)  // the compressing store is microcoded on some chips; compress in a register
        _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(__mmask16(mask), _mm512_loadu_ps(z + i)));
        count += __builtin_popcount(mask);
#else
        for (; mask != 0; mask &= mask - 1) out[count++] = z[i + __builtin_ctz(mask)];
#endif
    }
    return count;
}

// All values of at least `floor`, in order, in candidates; blocks whose best is below it are skipped.
static inline Candidates gather(const Scratch& s, int64_t vocab, float floor) {
    const int32_t floor_key = key_of(floor);
    int64_t n = 0;
    for (int64_t block = 0; block < padded(vocab) / kBlock; ++block)
        if (s.block_best[block] >= floor_key)
            n += append_at_least(s.z + block * kBlock, kBlock, floor, s.candidates + n);
    return {s.candidates, n};
}

// top-k: every stride-th token is a sample; a rank in it, with a margin, bounds the k-th largest from below in all but
// contrived rows. The count proves it; where it fails the whole row is searched.
static inline Candidates narrow_by_rank(const Scratch& s, int64_t vocab, int64_t top_k, float best, float c) {
    constexpr int64_t kSamples = 2048;
    const Candidates whole = {s.z, padded(vocab)};
    if (vocab < 2 * kSamples) return whole;
    const int64_t stride = vocab / kSamples, samples = vocab / stride;
    for (int64_t i = 0; i < samples; ++i) s.candidates[i] = s.z[i * stride];
    const int64_t expected = top_k / stride;
    int64_t margin = 8;
    while ((margin - 8) * (margin - 8) < 16 * expected) ++margin;  // 8 and four standard deviations
    if (2 * (expected + margin) >= samples) return whole;
    const int32_t floor =
        refine<Measure::count>(s.candidates, samples, best, c, uint64_t(expected + margin), s.histograms);
    if (floor <= kKeyOfMinusInfinity) return whole;
    const Candidates found = gather(s, vocab, float_of_key(floor));
    return found.n < top_k ? whole : Candidates{found.values, pad_block(s.candidates, found.n)};
}

// A z below which every token is lighter than `weight`; -inf where rounding leaves no such bound.
static inline float floor_of_weight(uint64_t weight, float best, float c) {
    if (weight < 2) return kMinusInfinity;
    const float exponent = float(63 - __builtin_clzll(weight) - kFractionBits) - 0.01f;  // below log2 of the weight
    const float floor = add_rn(add_rn(best, exponent / c), 0.0f);
    // Exponents are monotone in z, so this one test bounds every token below the floor.
    return exponent_of(floor, best, c) <= exponent ? floor : kMinusInfinity;
}

// All tokens of at least `weight`, and some lighter ones: all that min-p can keep.
static inline Candidates narrow_by_weight(const Scratch& s, int64_t vocab, uint64_t weight, float best, float c) {
    const float floor = floor_of_weight(weight, best, c);
    if (floor == kMinusInfinity) return {s.z, padded(vocab)};
    const Candidates found = gather(s, vocab, floor);
    return {found.values, pad_block(s.candidates, found.n)};
}

static inline uint64_t candidate_mass(const Candidates& from, float best, float c) {
    uint64_t mass = 0;
    for (int64_t i = 0; i < from.n; ++i) mass += weight_of(from.values[i], best, c);
    return mass;
}

// top-p: tokens lighter than an equal share of the mass that may go hold less than that mass together, so the boundary
// lies above them. Once they are gone, the share of those left is larger: the second round drops most of the tail.
static inline Candidates narrow_by_mass(const Scratch& s, int64_t vocab, uint64_t mass, uint64_t target, float best,
                                        float c) {
    Candidates from = narrow_by_weight(s, vocab, (mass - target) / uint64_t(vocab), best, c);
    if (from.values != s.candidates) return from;
    const uint64_t left = candidate_mass(from, best, c);  // at least target
    const float floor = floor_of_weight((left - target) / uint64_t(from.n), best, c);
    from.n = pad_block(s.candidates, append_at_least(from.values, from.n, floor, s.candidates));
    return from;
}

template <Measure measure>
static inline void histogram_of(const Candidates& from, const Scratch& s, float best, float c, int threads) {
    const int64_t chunks = ceil_div(from.n, kChunk);
    if (chunks < 8) threads = 1;  // a team costs more than it saves
    for (int64_t i = 0; i < int64_t(threads) * kCopies * kBins; ++i) s.histograms[i] = 0;
    parallel_for_with_thread(chunks, threads, [&](int64_t chunk, int thread) {
        const int64_t start = chunk * kChunk;
        exponent_histogram<measure>(from.values + start, smaller(kChunk, from.n - start), best, c,
                                    s.histograms + int64_t(thread) * kCopies * kBins);
    });
    sum_copies(s.histograms, int64_t(threads) * kCopies);
}

// Collecting needs room that `from` does not occupy: z is kept for the draw, so candidates serve when from is z, and
// otherwise the tail of candidates behind from.
template <Measure measure>
static inline int32_t threshold_key(const Candidates& from, const Scratch& s, float best, float c, uint64_t target) {
    const int bin = boundary_bin(s.histograms, target);
    float* room = from.values == s.z ? s.candidates : s.candidates + from.n;
    const int64_t n = collect_bin(from.values, from.n, best, c, bin, room);
    return refine<measure>(room, n, best, c, target, s.histograms);
}

// ---- 4. draw

struct Kept {
    int32_t key;      // at least this key
    uint64_t weight;  // and at least this weight
};

static inline bool is_kept(float z, uint64_t weight, const Kept& kept) {
    return (key_of(z) >= kept.key) & (weight >= kept.weight);
}

static inline uint64_t kept_block_mass(const float* z, float best, float c, const Kept& kept) {
    uint64_t mass = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
        const uint64_t weight = weight_of(z[i], best, c);
        mass += is_kept(z[i], weight, kept) ? weight : 0;
    }
    return mass;
}

static inline int64_t kept_block_count(const float* z, float best, float c, const Kept& kept) {
    int32_t count = 0;
    if (kept.weight == 0) {
        for (int64_t i = 0; i < kBlock; ++i) count += key_of(z[i]) >= kept.key;
    } else {
        for (int64_t i = 0; i < kBlock; ++i) count += is_kept(z[i], weight_of(z[i], best, c), kept);
    }
    return count;
}

static inline void kept_masses(const Scratch& s, int64_t vocab, float best, float c, const Kept& kept, int threads) {
    parallel_for(padded(vocab) / kChunk, threads, [&](int64_t chunk) {
        uint64_t mass = 0;
        for (int64_t block = chunk * (kChunk / kBlock); block < (chunk + 1) * (kChunk / kBlock); ++block)
            if (s.block_best[block] >= kept.key) mass += kept_block_mass(s.z + block * kBlock, best, c, kept);
        s.chunk_mass[chunk] = mass;
    });
}

// The first kept token whose inclusive prefix of mass exceeds `threshold`, which is below the kept mass.
static inline int64_t find_token(const Scratch& s, float best, float c, const Kept& kept, uint64_t threshold) {
    int64_t chunk = 0;
    while (threshold >= s.chunk_mass[chunk]) threshold -= s.chunk_mass[chunk++];
    for (int64_t block = chunk * (kChunk / kBlock);; ++block) {
        if (s.block_best[block] < kept.key) continue;
        const float* z = s.z + block * kBlock;
        const uint64_t mass = kept_block_mass(z, best, c, kept);
        if (threshold >= mass) {
            threshold -= mass;
            continue;
        }
        for (int64_t i = 0;; ++i) {
            const uint64_t weight = weight_of(z[i], best, c);
            if (!is_kept(z[i], weight, kept)) continue;
            if (threshold < weight) return block * kBlock + i;
            threshold -= weight;
        }
    }
}

// The draw over candidates, which hold every kept token in the order of the row: its rank among the kept ones, then
// the token of that rank.
static inline int64_t draw_candidate(const Candidates& from, const Scratch& s, float best, float c, const Kept& kept,
                                     uint64_t word) {
    uint64_t mass = 0;
    for (int64_t start = 0; start < from.n; start += kBlock)
        mass += kept_block_mass(from.values + start, best, c, kept);
    uint64_t threshold = mulhi64(word, mass);
    int64_t start = 0, rank = 0;
    for (;; start += kBlock) {
        mass = kept_block_mass(from.values + start, best, c, kept);
        if (threshold < mass) break;
        threshold -= mass;
        rank += kept_block_count(from.values + start, best, c, kept);
    }
    for (int64_t i = start;; ++i) {
        const uint64_t weight = weight_of(from.values[i], best, c);
        if (!is_kept(from.values[i], weight, kept)) continue;
        if (threshold < weight) break;
        threshold -= weight;
        ++rank;
    }
    for (int64_t block = 0;; ++block) {
        if (s.block_best[block] < kept.key) continue;
        const float* z = s.z + block * kBlock;
        const int64_t count = kept_block_count(z, best, c, kept);
        if (rank >= count) {
            rank -= count;
            continue;
        }
        for (int64_t i = 0;; ++i) {
            if (!is_kept(z[i], weight_of(z[i], best, c), kept)) continue;
            if (rank-- == 0) return block * kBlock + i;
        }
    }
}

static inline int64_t find_best(const Scratch& s, int32_t best) {
    int64_t block = 0;
    while (s.block_best[block] != best) ++block;
    int64_t token = block * kBlock;
    while (key_of(s.z[token]) != best) ++token;
    return token;
}

// A row is bad when it has no distribution or an argument is out of range; Python words the error.
static inline bool sample_row(const SampleArgs& a, int64_t row, const Scratch& s, int threads) {
    const LogitsArgs& logits = a.logits;
    const float temperature = a.temperature[row], top_p = a.top_p[row], min_p = a.min_p[row];
    const int64_t top_k = a.top_k[row], vocab = logits.vocab;
    const float* guidance = a.guidance + row * a.guidance_row_stride;
    a.tokens[row] = -1;
    if (a.logprobs != nullptr) a.logprobs[row] = __builtin_nanf("");
    if (!valid_parameters(temperature, top_p, min_p, top_k, a.seed[row], a.offset[row])) return false;
    for (int64_t guide = 0; guide < logits.guides; ++guide)
        if (!finite_number(guidance[guide * a.guidance_stride])) return false;

    const Extremes extremes = combine_row(logits, guidance, a.guidance_stride, row, s, threads);
    if (!has_distribution(extremes)) return false;
    const float best = float_of_key(extremes.best);
    const float c = inverse_temperature(temperature > 0.0f ? temperature : 1.0f);

    int64_t token;
    uint64_t mass = 0;
    if (temperature == 0.0f) {
        token = find_best(s, extremes.best);
        if (a.logprobs != nullptr) mass = row_mass(s, vocab, best, c, threads);
    } else {
        const bool by_rank = top_k > 0 && top_k < vocab, by_mass = top_p < 1.0f;
        const uint64_t index = a.row_in_counter ? uint64_t(row) : 0;
        const uint64_t word =
            a.words != nullptr ? a.words[row] : philox_u64(uint64_t(a.seed[row]), uint64_t(a.offset[row]), index);
        Kept kept = {kKeyOfMinusInfinity,
                     min_p < 1.0f ? fixed_point(min_p, kFractionBits) : uint64_t(1) << kFractionBits};
        Candidates from = {s.z, padded(vocab)};
        const bool filtered = by_rank || by_mass || kept.weight > 0;
        if (!filtered || (by_mass && !by_rank) || a.logprobs != nullptr) mass = row_mass(s, vocab, best, c, threads);
        if (by_rank) {
            from = narrow_by_rank(s, vocab, top_k, best, c);
            histogram_of<Measure::count>(from, s, best, c, threads);
            kept.key = threshold_key<Measure::count>(from, s, best, c, uint64_t(top_k));
        }
        if (by_mass) {
            uint64_t available = mass;
            if (by_rank) {  // what top-k left; threshold_key() reordered only the room behind or beside it
                from = {s.candidates, pad_block(s.candidates, append_at_least(from.values, from.n,
                                                                              float_of_key(kept.key), s.candidates))};
                available = candidate_mass(from, best, c);
            }
            const uint64_t target = mulhi64(fixed_point(top_p, 64), available);
            if (!by_rank) from = narrow_by_mass(s, vocab, available, target, best, c);
            int32_t key = extremes.best;
            if (target > 0) {
                histogram_of<Measure::mass>(from, s, best, c, threads);
                key = threshold_key<Measure::mass>(from, s, best, c, target);
            }
            kept.key = key > kept.key ? key : kept.key;
        }
        if (kept.weight > 0 && !by_rank && !by_mass) from = narrow_by_weight(s, vocab, kept.weight, best, c);
        if (from.values == s.candidates) {
            token = draw_candidate(from, s, best, c, kept, word);
        } else {
            if (filtered) kept_masses(s, vocab, best, c, kept, threads);
            const uint64_t threshold = mulhi64(word, total(s.chunk_mass, padded(vocab) / kChunk));
            token = find_token(s, best, c, kept, threshold);
        }
    }
    a.tokens[row] = token;
    if (a.logprobs != nullptr) {
        const double below = double(s.z[token]) - double(best);
        a.logprobs[row] = log_probability(below, temperature > 0.0f ? double(temperature) : 1.0, log_mass(mass));
    }
    return true;
}

// Whole rounds of one row per thread, then the remaining rows split over all threads.
template <class RowBody>
static inline int64_t for_rows(int64_t rows, int64_t vocab, int threads, void* scratch, const RowBody& body) {
    const int64_t whole = vocab < kChunk || threads == 1 ? rows : rows / threads * threads;
    int64_t bad = 0;
    parallel_for_with_thread(whole, threads, [&](int64_t row, int thread) {
        if (!body(row, carve(scratch, vocab, thread, threads), 1)) __atomic_fetch_add(&bad, 1, __ATOMIC_RELAXED);
    });
    for (int64_t row = whole; row < rows; ++row)
        if (!body(row, carve(scratch, vocab, 0, threads), threads)) ++bad;
    return bad;
}

static int64_t sample(const SampleArgs& a) {
    return for_rows(a.logits.rows, a.logits.vocab, a.threads, a.scratch,
                    [&](int64_t row, const Scratch& s, int threads) { return sample_row(a, row, s, threads); });
}

static int64_t logprobs(const LogprobArgs& a) {
    const int64_t vocab = a.logits.vocab;
    return for_rows(a.logits.rows, vocab, a.threads, a.scratch, [&](int64_t row, const Scratch& s, int threads) {
        float* out = a.out + row * a.columns;
        const float temperature = a.temperature[row];
        const float* guidance = a.guidance + row * a.guidance_row_stride;
        bool good = temperature > 0.0f && finite_number(temperature);
        for (int64_t guide = 0; guide < a.logits.guides; ++guide)
            good = good && finite_number(guidance[guide * a.guidance_stride]);
        Extremes extremes;
        if (good) extremes = combine_row(a.logits, guidance, a.guidance_stride, row, s, threads);
        if (!good || !has_distribution(extremes)) {
            for (int64_t i = 0; i < a.columns; ++i) out[i] = __builtin_nanf("");
            return false;
        }
        const float best = float_of_key(extremes.best);
        const double log_mass_of_row = log_mass(row_mass(s, vocab, best, inverse_temperature(temperature), threads));
        parallel_for(padded(vocab) / kChunk, threads, [&](int64_t chunk) {
            const int64_t end = smaller((chunk + 1) * kChunk, vocab);
            for (int64_t i = chunk * kChunk; i < end; ++i)
                out[i] = log_probability(double(s.z[i]) - double(best), double(temperature), log_mass_of_row);
        });
        for (int64_t i = vocab; i < a.columns; ++i) out[i] = kMinusInfinity;
        return true;
    });
}

extern const SamplingKernels sampling_kernels;
const SamplingKernels sampling_kernels = {scratch_bytes, sample, logprobs};

}  // namespace PSE_ISA

}  // namespace pse
