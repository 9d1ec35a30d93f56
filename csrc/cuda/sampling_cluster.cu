// Guided sampling where blocks come in clusters (compute capability 9.0): one launch, a cluster of blocks per row.
// Bytes  every logit once, from wherever it is; no scratch. z stays in the blocks' shared memory, 4 bytes per token.
// Story  1 hold: each block reads its slice of the row and keeps z; the cluster's best key
//        2 weigh: the slice's masses, and for top-k and top-p its histogram; the cluster's masses and histogram
//        3 settle: the thresholds' bins, then the keys, by the same search as in sampling.cu, over all of z: a group of
//          which no token reaches the bin costs a maximum, and no list is written
//        4 draw: every block knows the masses of all, one of them finds the token in its slice
// Order  as in sampling.cu: all sums are integers, and the decisions are the same functions of them. Every block takes
//        each decision for itself, from the same numbers: one cluster barrier a step, not two.
// Slices A thread reads back only what it wrote, in an order that gives neighbours different banks: z is what registers
//        would be if their number could depend on the vocabulary.
#include "cuda/sampling_row.cuh"

namespace pse {
namespace cuda {
namespace {

using namespace sampling;

constexpr int kMostBlocks = 8;  // of a cluster: what every such device can do
constexpr int kWide = 512;      // threads; 4096 tokens a read. Two such blocks share a multiprocessor: 64 registers

// What the blocks of a cluster tell each other: written before a barrier, read by all after it. There are two sets of
// arrays in turns, so that a set is written again only when all have come to another barrier since they read it.
template <int kThreads>
struct Exchange {
    Shared<uint64_t> notes;   // [2, 2]
    Shared<uint64_t> digits;  // [2, kThreads]
    int turn = 0;

    struct Note {
        uint64_t first, second;
    };

    // A note of each block, given alike by all of its threads, to the lane of its rank; 0 to the lanes beyond.
    PSE_METHOD Note tell(uint64_t first, uint64_t second = 0 PSE_CALLER) {
        if (thread() == 0) {
            store(notes, 2 * turn, first);
            store(notes, 2 * turn + 1, second);
        }
        cluster_sync();
        Note note = {0, 0};
        if (lane() < cluster_size()) {
            const auto told = of_rank(notes, lane());
            note = {load(told, 2 * turn), load(told, 2 * turn + 1)};
        }
        turn ^= 1;
        return note;
    }

    // The sum over the blocks of a value of this thread.
    PSE_METHOD uint64_t sum(uint64_t own PSE_CALLER) {
        store(digits, turn * kThreads + thread(), own);
        cluster_sync();
        uint64_t all = 0;
        PSE_UNROLL
        for (int rank = 0; rank < kMostBlocks; ++rank)
            if (rank < cluster_size()) all += load(of_rank(digits, rank), turn * kThreads + thread());
        turn ^= 1;
        return all;
    }
};

// A block's part of a row.
template <int kThreads>
struct Slice {
    Shared<float> z;  // [groups, kGroup, kThreads]
    int first, end;   // of the row's groups

    PSE_METHOD int place(int group, int i) const { return ((group - first) * kGroup + i) * kThreads + thread(); }
    PSE_METHOD void keep(int group, const Group& tokens) const {
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) store(z, place(group, i), add_rn(tokens.z[i], 0.0f));  // -0 is +0
    }
    PSE_METHOD Group read(int group) const {
        Group tokens;
        PSE_UNROLL
        for (int i = 0; i < kGroup; ++i) tokens.z[i] = load(z, place(group, i));
        return tokens;
    }
    // f(z) for the tokens of this thread, but for groups whose best does not reach what the caller looks for.
    template <class Reaches, class F>
    PSE_METHOD void each(const Reaches& reaches, const F& f) const {
        for (int group = first; group < end; ++group) {
            const Group tokens = read(group);
            if (!reaches(best_of(tokens))) continue;  // nearly all
            PSE_UNROLL
            for (int i = 0; i < kGroup; ++i) f(tokens.z[i]);
        }
    }
};

// ---- 1. hold

// The block's best key; a bad value is a key above infinity.
template <int kThreads>
PSE_DEVICE int32_t hold_slice(const Request& a, int64_t row, const Slice<kThreads>& slice) {
    Best best(a, row);
    for (int group = slice.first; group < slice.end; ++group)
        slice.keep(group, best.take(a, row, first_token<kThreads>(group)));
    return block_reduce<kThreads>(best.key(), Larger());
}

// ---- 2. weigh

// The slice's masses and, summed up in `bin_mass` and `histogram.counts`, its histogram.
template <int kThreads>
PSE_DEVICE Masses weigh_slice(const Slice<kThreads>& slice, const Scale& s, uint64_t floor,
                              const Histogram<kThreads>& histogram, Shared<uint64_t> bin_mass) {
    const bool counted = histogram.count || histogram.weigh;
    if (counted) {
        histogram.clear_counts();
        histogram.clear_masses();
        for (int i = thread(); i < kBins; i += kThreads) store(bin_mass, i, uint64_t(0));
        sync_block();
    }
    Weighing<kThreads> weighing = {s, floor, histogram, counted};
    for (int group = slice.first; group < slice.end; ++group) {
        weighing.take(slice.read(group));
        if (!histogram.weigh) continue;
        sync_block();  // a group is as much as the histogram holds
        for (int i = thread(); i < kBins; i += kThreads) store(bin_mass, i, load(bin_mass, i) + histogram.mass(i));
        histogram.clear_masses();
        sync_block();
    }
    return weighing.masses();
}

// all[i] = the sum of own[i] over the blocks.
template <int kThreads, class T>
PSE_DEVICE void sum_bins(Shared<T> own, Shared<T> all) {
    for (int i = thread(); i < kBins; i += kThreads) {
        T sum = 0;
        PSE_UNROLL
        for (int rank = 0; rank < kMostBlocks; ++rank)
            if (rank < cluster_size()) sum += load(of_rank(own, rank), i);
        store(all, i, sum);
    }
}

// ---- 3. settle

// The keys that a cluster holds, to settle_key().
template <int kThreads>
struct Held {
    const Slice<kThreads>& slice;
    const Scale& s;
    Exchange<kThreads>& exchange;
    Shared<uint32_t> low, middle, high;  // [kThreads or more]

    // The pieces of a weight: 14 bits each, of which a slice may add up 2^18.
    static constexpr int kPiece = 14;

    PSE_METHOD uint32_t below_best(float z) const { return uint32_t(s.best_key) - uint32_t(key_of(z)); }

    template <bool kByMass>
    PSE_METHOD int32_t select(int bin, uint64_t target PSE_CALLER) {
        uint32_t nearest = UINT32_MAX, farthest = 0;
        slice.each([&](float best) { return s.bin(best) <= bin; },
                   [&](float z) {
                       if (s.bin(z) != bin) return;
                       nearest = Smaller()(nearest, below_best(z));
                       farthest = Larger()(farthest, below_best(z));
                   });
        nearest = block_reduce<kThreads>(nearest, Smaller());
        farthest = block_reduce<kThreads>(farthest, Larger());
        const auto note = exchange.tell(~nearest, farthest);  // 0 is no bound, of a slice without such a key
        nearest = ~warp_reduce(uint32_t(note.first), Larger());
        farthest = warp_reduce(uint32_t(note.second), Larger());
        return search_key<kThreads>(s.best_key, nearest, farthest, target, [&](int shift, uint64_t digits) {
            store(low, thread(), 0u);
            store(middle, thread(), 0u);
            store(high, thread(), 0u);
            sync_block();
            slice.each([&](float best) { return below_best(best) <= farthest; },
                       [&](float z) {
                           const uint32_t distance = below_best(z) - nearest;
                           if (distance > farthest - nearest) return;  // not of the bin
                           if ((uint64_t(distance) >> (shift + digit_bits<kThreads>())) != digits) return;
                           const int digit = int(distance >> shift) & (kThreads - 1);
                           const uint64_t weight = kByMass ? s.weight(z) : 1;
                           atomic_add(low, digit, uint32_t(weight) & ((1u << kPiece) - 1));
                           if (!kByMass) return;
                           atomic_add(middle, digit, uint32_t(weight >> kPiece) & ((1u << kPiece) - 1));
                           atomic_add(high, digit, uint32_t(weight >> (2 * kPiece)));
                       });
            sync_block();
            const uint64_t own = (uint64_t(load(high, thread())) << (2 * kPiece)) +
                                 (uint64_t(load(middle, thread())) << kPiece) + load(low, thread());
            return exchange.sum(own);
        });
    }

    PSE_METHOD uint64_t mass(int bin, int32_t key PSE_CALLER) {
        uint64_t own = 0;
        slice.each([&](float best) { return key_of(best) >= key; },
                   [&](float z) {
                       if (key_of(z) >= key && s.bin(z) == bin) own += s.weight(z);
                   });
        return warp_reduce(exchange.tell(block_reduce<kThreads>(own, Sum())).first, Sum());
    }
};

// ---- a row, by its cluster

template <int kThreads>
PSE_DEVICE void sample_row(const Request& a, int slice_groups) {
    PSE_LAUNCHED_SHARED(float, z);
    constexpr int kBest = 0, kMass = 1;
    PSE_SHARED(uint64_t, facts, 2);  // of the row: kept here, since over all steps they would cost registers
    PSE_SHARED(uint64_t, notes, 4);
    PSE_SHARED(uint64_t, digits, 2 * kThreads);
    PSE_SHARED(uint32_t, counts, kBins);
    PSE_SHARED(uint32_t, low, kBins);
    PSE_SHARED(uint32_t, high, kBins);
    PSE_SHARED(uint32_t, full, 1);
    PSE_SHARED(uint64_t, masses, kBins);
    PSE_SHARED(uint32_t, row_counts, kBins);
    PSE_SHARED(uint64_t, row_masses, kBins);
    static_assert(kThreads <= kBins, "the histogram's arrays serve the digits too");
    const int64_t row = row_of(uint32_t(cluster_size()));
    const int start = cluster_rank() * slice_groups, groups = a.groups;
    const Slice<kThreads> slice = {z, Smaller()(start, groups), Smaller()(start + slice_groups, groups)};
    Exchange<kThreads> exchange = {notes, digits};

    // The best key as an unsigned number of the same order, then the complement of the first rank that has it.
    const uint32_t own_best = uint32_t(hold_slice<kThreads>(a, row, slice)) ^ 0x80000000u;
    const uint64_t noted = exchange.tell((uint64_t(own_best) << 32) | ~uint32_t(cluster_rank())).first;
    const uint64_t best = warp_reduce(noted, Larger());
    const auto key_of_best = [](uint64_t x) { return int32_t(uint32_t(x >> 32) ^ 0x80000000u); };
    if (thread() == 0) store(facts, kBest, best);
    sync_block();
    const auto scale = [&](const Row& r) { return scale_of(key_of_best(load(facts, kBest)), r.c); };
    const auto mass = [&] { return load(facts, kMass); };
    bool greedy;
    {
        const Row r = read_row(a, row);
        if (!r.good || key_of_best(best) >= kKeyOfInfinity || key_of_best(best) <= kKeyOfMinusInfinity) {
            if (cluster_rank() == 0 && thread() == 0) {
                store(a.tokens, row, int64_t(-1));
                if (a.logprobs != nullptr) store(a.logprobs, row, bits_float(0x7fc00000u));
            }
            return;
        }
        greedy = r.greedy;
    }

    // Greedy: the first of the best is the first at which their running sum exceeds 0. Alone it needs no masses.
    int32_t key = greedy ? key_of_best(best) : kKeyOfMinusInfinity;
    bool here = false;
    uint64_t threshold = 0;
    if (!greedy || a.logprobs != nullptr) {
        uint64_t kept_mass;  // of the block of this lane's rank
        {
            const Row r = read_row(a, row);
            const Histogram<kThreads> histogram = {counts, low, high, full, r.by_rank, r.by_mass};
            const Masses own = weigh_slice<kThreads>(slice, scale(r), r.floor, histogram, masses);
            const auto note = exchange.tell(own.all, own.kept);
            kept_mass = note.second;
            const uint64_t sum = warp_reduce(note.first, Sum());
            if (thread() == 0) store(facts, kMass, sum);
            if (r.by_rank) sum_bins<kThreads>(counts, row_counts);
            if (r.by_mass) sum_bins<kThreads>(masses, row_masses);
            sync_block();
        }
        const Row r = read_row(a, row);
        if (r.by_rank || r.by_mass) {
            const Scale s = scale(r);
            const auto bin_mass = [&](int i) { return load(row_masses, i); };
            const Search search = find_bins<kThreads>(r, mass, [&](int i) { return load(row_counts, i); }, bin_mass);
            if (!search.keeps_all()) {
                Held<kThreads> held = {slice, s, exchange, low, counts, high};
                key = settle_key<kThreads>(r, search, mass, held, bin_mass);
                const Kept kept = {key, r.floor};
                uint64_t sum = 0;
                slice.each([&](float best_z) { return key_of(best_z) >= key; },
                           [&](float z_of_token) { sum += kept(z_of_token, s); });
                kept_mass = exchange.tell(block_reduce<kThreads>(sum, Sum())).first;
            }
        }
        if (!greedy) {
            const uint64_t before = warp_inclusive(kept_mass) - kept_mass;
            threshold = mulhi64(word_of(a, row), warp_reduce(kept_mass, Sum()));
            const uint64_t first = shuffle(before, cluster_rank()), count = shuffle(kept_mass, cluster_rank());
            here = first <= threshold && threshold < first + count;
            threshold -= first;
        }
    }
    if (greedy) here = cluster_rank() == int(~uint32_t(load(facts, kBest)));
    if (!here) return;
    const Row r = read_row(a, row);
    find_token<kThreads>(a, row, scale(r), {key, r.floor}, threshold, mass, slice.first, slice.end,
                         [&](int group) { return slice.read(group); });
}

template <int kThreads>
PSE_KERNEL(kThreads, kThreads == kWide ? 2 : 8)
sampling_cluster(Request a, int slice_groups) {
    after_earlier_launches();
    if constexpr (kHaveClusters) {
        sample_row<kThreads>(a, slice_groups);
        cluster_sync();  // others may still read what this block has in shared memory
    }
}

// ---- launchers

// As many blocks as a row has reads, since latency decides at small batches; a power of two.
int cluster_size_of(int64_t groups) {
    int size = 1;
    while (size < kMostBlocks && size < groups) size *= 2;
    return size;
}

template <int kThreads>
int64_t slice_bytes(int64_t groups) {
    return groups * kThreads * kGroup * int64_t(sizeof(float));
}

template <int kThreads>
bool fits(int64_t vocab, int device) {
    const int64_t groups = ceil_div(vocab, kThreads * kGroup);
    const int64_t limit = cluster_shared_limit(device, sampling_cluster<kThreads>);
    return slice_bytes<kThreads>(ceil_div(groups, cluster_size_of(groups))) <= limit;
}

template <int kThreads>
int launch_sample(const SampleArgs& args, const Target& target) {
    const Request a = request_of(args, kThreads);
    const int size = cluster_size_of(a.groups);
    const int slice_groups = int(ceil_div(a.groups, size));
    return launch_clusters("sampling_cluster", target, a.logits.rows, size, kThreads,
                           slice_bytes<kThreads>(slice_groups), sampling_cluster<kThreads>, a, slice_groups);
}

}  // namespace

bool sampling_fits_cluster(int64_t vocab, int threads, int device) {
    return is_narrow(vocab, threads) ? fits<kNarrow>(vocab, device) : fits<kWide>(vocab, device);
}

int guided_sample_in_clusters(const SampleArgs& args, int device, void* stream) {
    const Target target = {device, stream};
    return is_narrow(args.logits.vocab, args.threads) ? launch_sample<kNarrow>(args, target)
                                                      : launch_sample<kWide>(args, target);
}

}  // namespace cuda
}  // namespace pse
