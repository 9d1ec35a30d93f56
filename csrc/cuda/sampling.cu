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
#include "cuda/sampling_row.cuh"

namespace pse {
namespace cuda {
namespace {

using namespace sampling;

// What launch 2 leaves for launch 3, per row.
constexpr int kState = 6;
constexpr int kSearch = 0;     // the bins to list, see pack_bins(), or 0: nothing is left to do. Log-probs: the row's
                               // log-mass, a double
constexpr int kRank = 1;       // of the top-k threshold within its bin
constexpr int kAboveTopK = 2;  // mass of the bins above top-k's
constexpr int kAboveTopP = 3;  // mass of the bins above top-p's first
constexpr int kMass = 4;       // of the row before all filters
constexpr int kBest = 5;       // the row's best key; log-probs: with bit 32 set, so that 0 is a bad row

struct Job : Request {
    uint32_t chunks;    // per row
    Global<float> out;  // [rows, columns], guided_logprobs
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

// A chunk is kGroups reads of a block, one after the other: more blocks at a time hide the latency, where more
// registers a thread would not. Those count that begin within the vocabulary.
template <int kGroups>
PSE_DEVICE int first_group(int chunk) {
    return chunk * kGroups;
}
template <int kGroups>
PSE_DEVICE int end_group(const Job& a, int chunk) {
    return Smaller()((chunk + 1) * kGroups, a.groups);
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
PSE_KERNEL(kThreads, kResident<kThreads>)
sampling_combine(Job a) {
    after_earlier_launches();
    const int64_t row = row_of(a.chunks);
    const int chunk = part_of(a.chunks);
    if (chunk == 0) clear_row<kThreads>(a, row);
    Best best(a, row);
    for (int group = first_group<kGroups>(chunk); group < end_group<kGroups>(a, chunk); ++group)
        best.take(a, row, first_token<kThreads>(group));
    const int32_t key = block_reduce<kThreads>(best.key(), Larger());
    if (thread() == 0) store(a.best, row * a.chunks + chunk, key);
}

// ---- 4. draw: what ends launch 2 or launch 3

// What find_in_chunk() needs beside the row's parameters. chunk < 0: there is nothing to find now.
struct Drawn {
    int chunk;
    uint64_t threshold;
};

// By the last block of a row, when the kept masses of its chunks are there.
template <int kThreads>
PSE_DEVICE Drawn draw(const Job& a, int64_t row) {
    const int64_t first = row * a.chunks;
    const uint64_t kept_mass = sum_of<kThreads>(int(a.chunks), [&](int i) { return load(a.kept, first + i); });
    const uint64_t threshold = mulhi64(word_of(a, row), kept_mass);
    const Reached<uint64_t> reached =
        first_reaching<kThreads>(int(a.chunks), threshold + 1, [&](int i) { return load(a.kept, first + i); });
    return {reached.index, threshold - reached.before};
}

// Loaded where it is needed: kept over the draw it would cost registers.
PSE_DEVICE uint64_t mass_of(const Job& a, int64_t row) { return load(a.state, row * kState + kMass); }

template <int kThreads, int kGroups>
PSE_DEVICE void find_in_chunk(const Job& a, int64_t row, const Scale& s, const Kept& kept, const Drawn& drawn) {
    const float w = usual_guidance(a, row);
    find_token<kThreads>(
        a, row, s, kept, drawn.threshold, [&] { return mass_of(a, row); }, first_group<kGroups>(drawn.chunk),
        end_group<kGroups>(a, drawn.chunk),
        [&](int group) { return read_group(a, row, first_token<kThreads>(group), w); });
}

// ---- 2. weigh

// Every warp finds these for itself, which saves barriers: a row has few chunks.
PSE_DEVICE int32_t row_best(const Job& a, int64_t row PSE_CALLER) {
    int32_t best = INT32_MIN;
    for (uint32_t i = uint32_t(lane()); i < a.chunks; i += kWarp)
        best = Larger()(best, load(a.best, row * a.chunks + i));
    return warp_reduce(best, Larger());
}
PSE_DEVICE int first_chunk_of(const Job& a, int64_t row, int32_t best PSE_CALLER) {
    uint32_t first = a.chunks;
    for (uint32_t i = uint32_t(lane()); i < a.chunks; i += kWarp)
        if (load(a.best, row * a.chunks + i) == best) first = Smaller()(first, i);
    return int(warp_reduce(first, Smaller()));
}

PSE_HD uint64_t pack_bins(const Search& search) {
    return (uint64_t(1) << 48) | (uint64_t(search.top_k) << 32) | (uint64_t(search.low) << 16) | uint64_t(search.high);
}

// By the last block of a row with filters: leaves for launch 3 what it needs. False where the filters keep all.
template <int kThreads>
PSE_DEVICE bool leave_search(const Job& a, int64_t row, const Row& r, int32_t best) {
    const int64_t first = row * kBins;
    const Search search = find_bins<kThreads>(
        r, [&] { return mass_of(a, row); }, [&](int i) { return load(a.bin_count, first + i); },
        [&](int i) { return load(a.bin_mass, first + i); });
    if (search.keeps_all()) return false;
    if (thread() == 0) {
        store(a.state, row * kState + kSearch, pack_bins(search));
        store(a.state, row * kState + kRank, search.rank);
        store(a.state, row * kState + kAboveTopK, search.above_top_k);
        store(a.state, row * kState + kAboveTopP, search.above_top_p);
        store(a.state, row * kState + kBest, uint64_t(uint32_t(best)));
    }
    return true;
}

// By a block of launch 3.
PSE_DEVICE Search take_search(const Job& a, int64_t row) {
    const auto state = [&](int i) { return load(a.state, row * kState + i); };
    const uint64_t bins = state(kSearch);
    return {int(bins >> 32) & 0xffff, int(bins >> 16) & 0xffff, int(bins) & 0xffff, state(kRank),
            state(kAboveTopK),        state(kAboveTopP)};
}

// Masses of a chunk, and its part of the row's histogram: how many tokens a bin has, what they weigh.
template <int kThreads, int kGroups, bool kFilters>
PSE_DEVICE void weigh_chunk(const Job& a, int64_t row, int chunk, const Scale& s, uint64_t floor, bool count,
                            bool weigh) {
    PSE_SHARED(uint32_t, counts, kFilters ? kBins : 1);
    PSE_SHARED(uint32_t, low, kFilters ? kBins : 1);
    PSE_SHARED(uint32_t, high, kFilters ? kBins : 1);
    PSE_SHARED(uint32_t, full, 1);
    const Histogram<kThreads> histogram = {counts, low, high, full, count, weigh};
    const bool counted = kFilters && (count || weigh);
    Weighing<kThreads> weighing = {s, floor, histogram, kFilters};
    // A chunk that weighs nothing is not read again: most of a row at a low temperature.
    if (s.bin(float_of_key(load(a.best, row * a.chunks + chunk))) < kBins) {
        if (counted) {
            histogram.clear_counts();
            histogram.clear_masses();
            sync_block();
        }
        const float w = usual_guidance(a, row);
        for (int group = first_group<kGroups>(chunk); group < end_group<kGroups>(a, chunk); ++group)
            weighing.take(read_group(a, row, first_token<kThreads>(group), w));
        if (counted) {
            sync_block();
            for (int i = thread(); i < kBins; i += kThreads) {
                const uint32_t number = load(counts, i);
                const uint64_t bin_mass = histogram.mass(i);
                if (number > 0) atomic_add(a.bin_count, row * kBins + i, number);
                if (bin_mass > 0) atomic_add(a.bin_mass, row * kBins + i, bin_mass);
            }
        }
    }
    const Masses masses = weighing.masses();
    if (thread() == 0) {
        store(a.mass, row * a.chunks + chunk, masses.all);
        store(a.kept, row * a.chunks + chunk, masses.kept);
    }
}

template <int kThreads, int kGroups, bool kFilters>
PSE_KERNEL(kThreads, kResident<kThreads>)
sampling_weigh(Job a) {
    after_earlier_launches();
    const int64_t row = row_of(a.chunks);
    const int chunk = part_of(a.chunks);
    bool greedy;
    {
        const int32_t best = row_best(a, row);
        const Row r = read_row(a, row);
        if (!r.good || best >= kKeyOfInfinity || best <= kKeyOfMinusInfinity) return;
        greedy = r.greedy;
        if (greedy && a.logprobs == nullptr) {  // needs no masses
            if (chunk != first_chunk_of(a, row, best)) return;
        } else {
            weigh_chunk<kThreads, kGroups, kFilters>(a, row, chunk, scale_of(best, r.c), r.floor, r.by_rank, r.by_mass);
        }
    }
    if (!greedy || a.logprobs != nullptr) {
        if (!last_block(a.tickets, row * 2, a.chunks)) return;
        const uint64_t mass = sum_of<kThreads>(int(a.chunks), [&](int i) { return load(a.mass, row * a.chunks + i); });
        if (thread() == 0) store(a.state, row * kState + kMass, mass);
        sync_block();
    }
    const int32_t best = row_best(a, row);  // again, as the row's parameters: keeping them would cost registers
    if (a.tokens == nullptr) {
        if (thread() == 0) {
            store(a.state, row * kState + kSearch, double_bits(log_mass(mass_of(a, row))));
            store(a.state, row * kState + kBest, (uint64_t(1) << 32) | uint32_t(best));
        }
        return;
    }
    if (kFilters) {
        const Row r = read_row(a, row);
        if ((r.by_rank || r.by_mass) && leave_search<kThreads>(a, row, r, best)) return;
    }
    const Row r = read_row(a, row);
    // Greedy: the first of the best is the first at which their running sum exceeds 0.
    const Drawn drawn = greedy ? Drawn{first_chunk_of(a, row, best), 0} : draw<kThreads>(a, row);
    find_in_chunk<kThreads, kGroups>(a, row, scale_of(best, r.c), {greedy ? best : kKeyOfMinusInfinity, r.floor},
                                     drawn);
}

// ---- 3. settle

// The listed keys, to settle_key().
template <int kThreads>
struct Listed {
    Global<const int32_t> list;
    int64_t n;
    Scale s;

    template <bool kByMass>
    PSE_METHOD int32_t select(int bin, uint64_t target PSE_CALLER) const {
        constexpr int64_t kRound = int64_t(kThreads) * (4096 / kThreads - 1);  // keys between two looks at the sums
        PSE_SHARED(uint32_t, low, kThreads);
        PSE_SHARED(uint32_t, high, kThreads);
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
        return search_key<kThreads>(s.best_key, nearest, farthest, target, [&](int shift, uint64_t digits) {
            uint64_t own = 0;
            for (int64_t round = 0; round < n; round += kRound) {
                store(low, thread(), 0u);
                store(high, thread(), 0u);
                sync_block();
                for (int64_t i = round + thread(); i < Smaller()(round + kRound, n); i += kThreads) {
                    const float z = float_of_key(load(list, i));
                    const uint64_t distance = uint32_t(s.best_key) - uint32_t(key_of(z)) - nearest;
                    if (s.bin(z) != bin || (distance >> (shift + digit_bits<kThreads>())) != digits) continue;
                    const int digit = int(distance >> shift) & (kThreads - 1);
                    const uint64_t weight = kByMass ? s.weight(z) : 1;
                    atomic_add(low, digit, uint32_t(weight) & ((1u << kLowBits) - 1));
                    if (kByMass) atomic_add(high, digit, uint32_t(weight >> kLowBits));
                }
                sync_block();
                own += (uint64_t(load(high, thread())) << kLowBits) + load(low, thread());
            }
            return own;
        });
    }

    PSE_METHOD uint64_t mass(int bin, int32_t key PSE_CALLER) const {
        uint64_t own = 0;
        for (int64_t i = thread(); i < n; i += kThreads) {
            const float z = float_of_key(load(list, i));
            if (key_of(z) >= key && s.bin(z) == bin) own += s.weight(z);
        }
        return block_reduce<kThreads>(own, Sum());
    }
};

// Lists the chunk's keys in the bins that are searched, and sums up what is surely kept.
template <int kThreads, int kGroups>
PSE_DEVICE void list_chunk(const Job& a, int64_t row, int chunk, const Search& search, const Scale& s, uint64_t floor) {
    PSE_SHARED(uint32_t, piece, 1);
    uint64_t kept = 0;
    uint32_t count = 0, start = 0;
    if (s.bin(float_of_key(load(a.best, row * a.chunks + chunk))) <= search.last()) {
        const int first = first_group<kGroups>(chunk), end = end_group<kGroups>(a, chunk);
        const float w = usual_guidance(a, row);
        uint32_t listed = 0;  // a bit per token of this thread, the first group's in the lowest
        for (int group = first; group < end; ++group) {
            const Group tokens = read_group(a, row, first_token<kThreads>(group), w);
            if (s.bin(best_of(tokens)) > search.last()) continue;  // nearly all
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) {
                const float exponent = s.exponent(tokens.z[i]);
                const uint64_t weight = weight_of_exponent(exponent);
                kept += bin_of(exponent) < search.low && weight >= floor ? weight : 0;
                listed |= uint32_t(search.holds(bin_of(exponent))) << ((group - first) * kGroup + i);
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
            for (int group = first; listed != 0; ++group, listed >>= kGroup) {
                if ((listed & ((1u << kGroup) - 1)) == 0) continue;
                const Group tokens = read_group(a, row, first_token<kThreads>(group), w);
                PSE_UNROLL
                for (int i = 0; i < kGroup; ++i)
                    if ((listed >> i) & 1u) store(a.list, to++, key_of_token(tokens.z[i]));
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
PSE_KERNEL(kThreads, kResident<kThreads>)
sampling_settle(Job a) {
    after_earlier_launches();
    const int64_t row = row_of(a.chunks);
    const int chunk = part_of(a.chunks);
    if (load(a.state, row * kState + kSearch) == 0) return;  // the row is bad, or its token is drawn
    const Search search = take_search(a, row);
    const int32_t best_key = int32_t(uint32_t(load(a.state, row * kState + kBest)));
    {
        const Row r = read_row(a, row);
        list_chunk<kThreads, kGroups>(a, row, chunk, search, scale_of(best_key, r.c), r.floor);
    }
    if (!last_block(a.tickets, row * 2 + 1, a.chunks)) return;

    const Row r = read_row(a, row);  // again: keeping it would cost registers
    const Scale s = scale_of(best_key, r.c);
    const Listed<kThreads> listed = {a.list + row * a.logits.vocab, int64_t(load(a.list_end, row)), s};
    const int32_t key = settle_key<kThreads>(
        r, search, [&] { return mass_of(a, row); }, listed, [&](int i) { return load(a.bin_mass, row * kBins + i); });
    const Kept chosen = {key, r.floor};
    for (uint32_t c = uint32_t(warp()); c < a.chunks; c += kThreads / kWarp) {
        const int64_t at = row * a.chunks + c;
        const uint32_t end = load(a.piece_end, at);
        uint64_t more = 0;
        for (uint32_t i = load(a.piece, at) + uint32_t(lane()); i < end; i += kWarp)
            more += chosen(float_of_key(load(a.list, row * a.logits.vocab + i)), s);
        more = warp_reduce(more, Sum());
        if (lane() == 0 && more > 0) store(a.kept, at, load(a.kept, at) + more);
    }
    sync_block();
    const Drawn drawn = draw<kThreads>(a, row);
    find_in_chunk<kThreads, kGroups>(a, row, s, chosen, drawn);
}

// ---- log-probs of whole rows: fp64 per token, since the definition divides there

template <int kThreads, int kGroups>
PSE_KERNEL(kThreads, kResident<kThreads>)
sampling_logprobs(Job a, uint32_t column_chunks) {
    after_earlier_launches();
    const int64_t row = row_of(column_chunks);
    const int chunk = part_of(column_chunks);
    const uint64_t best = load(a.state, row * kState + kBest);
    const double log_mass_of_row = bits_double(load(a.state, row * kState + kSearch));
    const double temperature = double(temperature_of(a, row));
    const float w = usual_guidance(a, row);
    const double best_z = double(float_of_key(int32_t(uint32_t(best))));
    for (int group = first_group<kGroups>(chunk); group < first_group<kGroups>(chunk + 1); ++group) {
        const int64_t first = first_token<kThreads>(group);
        Group tokens = {};
        if (best != 0) tokens = read_group(a, row, first, w);
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            const float z = add_rn(max_number(tokens.z[i], kMinusInfinity), 0.0f);  // -0 would give a log-prob of -0
            const double below = sub_rn(double(z), best_z);
            const float value = log_probability(below, temperature, log_mass_of_row);
            if (first + i < a.columns)
                store(a.out, row * a.columns + first + i, best != 0 ? value : bits_float(0x7fc00000u));
        }
    }
}

// ---- launchers

// 4096 tokens per block: 32 blocks for a row of 128k, so that one row already spreads over the card. Rows below two
// thousand tokens take blocks of 64 threads: 512 tokens.
constexpr int kWide = 256, kWideGroups = 2, kNarrowGroups = 1;

int64_t chunk_size(bool narrow) { return narrow ? kNarrow * kNarrowGroups * kGroup : kWide * kWideGroups * kGroup; }

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

Job job_of(const Request& request, void* scratch, bool filters, bool narrow) {
    Job job = {};
    static_cast<Request&>(job) = request;
    job.chunks = uint32_t(ceil_div(request.logits.vocab, chunk_size(narrow)));
    lay_out(job, reinterpret_cast<int64_t>(scratch), request.logits.rows, request.logits.vocab, filters);
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
    const Job job = job_of(request_of(args, narrow ? kNarrow : kWide), args.scratch, args.filters, narrow);
    const Target target = {device, stream};
    return narrow ? launch_sample<kNarrow, kNarrowGroups>(job, args.filters, target)
                  : launch_sample<kWide, kWideGroups>(job, args.filters, target);
}

int guided_logprobs(const LogprobArgs& args, int device, void* stream) {
    const bool narrow = is_narrow(args.logits.vocab, args.threads);
    const Request request = request_of(args.logits, args.same, args.rows, narrow ? kNarrow : kWide);
    Job job = job_of(request, args.scratch, false, narrow);
    job.out = global<float>(args.out, args.logits.rows * args.columns);
    job.columns = args.columns;
    const Target target = {device, stream};
    return narrow ? launch_logprobs<kNarrow, kNarrowGroups>(job, target)
                  : launch_logprobs<kWide, kWideGroups>(job, target);
}

}  // namespace cuda
}  // namespace pse
