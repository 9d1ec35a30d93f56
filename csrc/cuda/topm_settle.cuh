// 3 of topm.cu: K of every group, a digit a launch, by the way that is left: over the candidates where the bracket has
// held, over the tensors where not. The unlucky way costs no launches of its own, and the host need not know of it.
//
// Step         candidates                                    tensors
// 0, 1, ...    a digit                                       a digit
// last digit   all that is left                              a digit
// and one      4: edit the chosen (one_pass), or count them  ties
#pragma once
#include "cuda/topm_exact.cuh"
#include "cuda/topm_pool.cuh"

namespace pse {
namespace cuda {

template <class Key>
PSE_DEVICE void settle_pool(const View<Key>& v, int step, int64_t g, int64_t slice, int64_t share,
                            const RankRoom<Key>& room) {
    const int64_t path = load(v.state_of(g), kPath), first = load(v.group(g), kPoolFirst);
    if (path != kPool) return;
    const Pairs<Key> pool = {v.pool_keys + first, v.pool_indices + first, load(v.state_of(g), kWithin)};
    if (step < kDigits<Key> - 1) {
        narrow(v, g, kK, pool, slice, share, room);
    } else if (step < kDigits<Key>) {
        finish(v, g, kK, pool, slice, share, room);
    } else {
        if (slice == 0) put_thresholds(v, g, bound_at<Key>(v.state_of(g), kKKey).key);
        close_pool(v, g, slice, share);
    }
}

// The first `share` blocks of every group have its candidates, the others the tensors.
template <class M>
PSE_KERNEL(kThreads, (IsWide<M>::value ? kAnyOccupancy : 2))
topm_settle(View<typename M::Key> v, int step, int64_t share) {
    after_earlier_launches();
    using Key = typename M::Key;
    PSE_RANK_ROOM(Key, room, kCopies);
    const int64_t pools = v.num_groups * share;
    if (block() < pools)
        settle_pool(v, step, block() / share, block() % share, share, room);
    else
        exact_walk<M>(v, step, block() - pools, blocks() - pools, room);
}

}  // namespace cuda
}  // namespace pse
