// Warps, blocks and clusters: who runs when, and who waits for whom.
#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "lanes.h"

namespace pse {
namespace ptx {

namespace {

constexpr int64_t kMost = 1 << 28;  // instructions of a warp: minutes

bool guarded(const Warp& w, const Instruction& in, int lane) {
    return in.guard < 0 || w.is_true(in.guard, lane) != in.guard_negated;
}

// Lanes that the collective at `in` asks for.
uint32_t members(const Warp& w, const Instruction& in, int lane) {
    return in.members < 0 ? kAllLanes : w.get<uint32_t>(in.operands[size_t(in.members)], lane);
}

// Lets those meet at a collective of the warp of whom all that they ask for are there.
void meet(Warp& w, const Kernel& kernel, int at) {
    const Instruction& in = kernel.code[size_t(at)];
    uint32_t there = 0;
    each(w.waiting, [&](int l) { there |= uint32_t(w.at[l] == at) << l; });
    for (uint32_t left = there; left != 0;) {
        const int lane = __builtin_ctz(left);
        const uint32_t wanted = members(w, in, lane);
        left &= left - 1;
        if ((wanted >> lane & 1) == 0) fail("a collective of a lane that is not a member");
        if ((wanted & ~w.alive) != 0) fail("a collective that lanes which have left the kernel cannot reach");
        if ((wanted & ~there) != 0) continue;
        each(wanted, [&](int l) {
            if (members(w, in, l) != wanted) fail("a collective whose lanes name different members");
        });
        in.run(w, in, wanted);
        w.waiting &= ~wanted;
        there &= ~wanted;
        left &= ~wanted;
        each(wanted, [&](int l) { w.at[l] = at + 1; });
    }
}

// All lanes of the warp stand at a barrier of the block or the cluster.
bool arrived(Warp& w, const Kernel& kernel) {
    const int at = w.at[__builtin_ctz(w.alive)];
    bool together = true;
    each(w.alive, [&](int l) { together = together && w.at[l] == at; });
    if (!together) fail("diverged: lanes of one warp wait at different places");
    const Control control = kernel.code[size_t(at)].control;
    if (control != Control::block && control != Control::cluster) return false;
    if (control == Control::cluster && w.arrived != w.alive) fail("a cluster barrier that lanes have not arrived at");
    w.state = control == Control::block ? State::at_block_barrier : State::at_cluster_barrier;
    w.now = at;
    return true;
}

// Runs a warp until it waits for others of its block or cluster, or is done.
void advance(Warp& w, const Kernel& kernel) {
    while (w.alive != 0) {
        const uint32_t ready = w.alive & ~w.waiting;
        if (ready == 0) {
            // Nobody can run: either all are at one barrier, or somebody waits for ever.
            if (arrived(w, kernel)) return;
            fail("a collective that others of the warp do not reach");
        }
        int pc = INT32_MAX, next = INT32_MAX;  // the least, and the least of the others
        uint32_t lanes = 0;
        each(ready, [&](int l) {
            if (w.at[l] < pc) {
                next = pc;
                pc = w.at[l];
                lanes = 0;
            }
            if (w.at[l] == pc)
                lanes |= 1u << l;
            else
                next = std::min(next, w.at[l]);
        });
        const auto leave_at = [&](uint32_t those, int place) { each(those, [&](int l) { w.at[l] = place; }); };
        for (bool together = true; together;) {
            const Instruction& in = kernel.code[size_t(pc)];
            w.now = pc;
            if (++w.done == kMost) fail("it does not come to an end");
            uint32_t taking = lanes;
            if (in.guard >= 0) {
                taking = 0;
                each(lanes, [&](int l) { taking |= uint32_t(guarded(w, in, l)) << l; });
            }
            switch (in.control) {
                case Control::none:
                    if (taking != 0) in.run(w, in, taking);
                    ++pc;
                    break;
                case Control::branch:
                    if (taking != 0 && taking != lanes) {
                        leave_at(taking, in.target);
                        leave_at(lanes & ~taking, pc + 1);
                        together = false;
                    } else {
                        pc = taking != 0 ? in.target : pc + 1;
                    }
                    break;
                case Control::exit:
                    if ((taking & w.arrived) != 0) fail("the kernel is left between the halves of a cluster barrier");
                    if (w.block->overlapping && (taking & ~w.started) != 0)
                        fail("the kernel is left without griddepcontrol.wait");
                    each(taking, [&](int l) {
                        for (const auto& group : w.copies[l])
                            if (!group.empty()) fail("the kernel is left without waiting for its copies");
                    });
                    w.alive &= ~taking;
                    leave_at(lanes & ~taking, pc + 1);
                    together = false;
                    break;
                default:
                    if (taking == 0) {
                        ++pc;
                        break;
                    }
                    if (taking != lanes) fail("a collective under a guard that some lanes do not pass");
                    leave_at(lanes, pc);
                    w.waiting |= lanes;
                    if (in.control == Control::warp) meet(w, kernel, pc);
                    together = false;
                    break;
            }
            if (together && pc >= next) {
                leave_at(lanes, pc);
                together = false;
            }
        }
    }
    w.state = State::done;
}

std::vector<size_t> drawn_order(size_t count, std::mt19937_64& random) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t(0));
    std::shuffle(order.begin(), order.end(), random);
    return order;
}

void release(Warp& w) {
    w.waiting = 0;
    if (w.state == State::at_cluster_barrier) w.arrived = 0;
    each(w.alive, [&](int l) { ++w.at[l]; });
    w.state = State::running;
}

[[noreturn]] void fail_in(const Warp& w, const Kernel& kernel, const std::string& what) {
    std::string places;
    int last = -1;
    each(w.waiting, [&](int l) {
        if (w.at[l] != last) places += "\n  lane " + std::to_string(l) + " waits: " + kernel.code[size_t(w.at[l])].text;
        last = w.at[l];
    });
    fail(kernel.name + ", block " + std::to_string(w.block->index) + ", warp " + std::to_string(w.index) + ", `" +
         kernel.code[size_t(w.now)].text + "`: " + what + places);
}

class Machine {
  public:
    explicit Machine(const Launch& launch)
        : launch_(launch), kernel_(*launch.kernel), random_(launch.seed), blocks_(size_t(launch.size)) {
        if (launch.threads % kWarp != 0)
            fail("a block of " + std::to_string(launch.threads) + " threads: no whole warps");
        for (Block& block : blocks_) {
            block.overlapping = launch.overlapping;
            block.cluster = &blocks_;
            block.warps.resize(size_t(launch.threads) / kWarp);
            block.shared.resize(size_t(kernel_.shared_bytes + 15) / 16 * 16 + size_t(launch.dynamic_shared));
            for (size_t i = 0; i < block.warps.size(); ++i) {
                Warp& w = block.warps[i];
                w.block = &block;
                w.index = int(i);
                w.registers.resize(size_t(kernel_.registers) * kWarp);
                for (uint64_t& bits : w.registers) bits = random_();
            }
        }
    }

    void run() {
        for (const size_t cluster : drawn_order(size_t(launch_.clusters), random_)) {
            for (size_t rank = 0; rank < blocks_.size(); ++rank) start(blocks_[rank], cluster, rank);
            while (run_cluster()) {
            }
        }
    }

  private:
    void start(Block& block, size_t cluster, size_t rank) {
        block.rank = int(rank);
        block.index = int64_t(cluster * blocks_.size() + rank);
        for (char& byte : block.shared) byte = char(0xa7);
        for (Warp& w : block.warps) {
            w.state = State::running;
            w.done = 0;
            w.started = w.arrived = 0;
            w.alive = kAllLanes;
            w.waiting = 0;
            for (int l = 0; l < kWarp; ++l) w.at[l] = 0, w.copies[l].clear();
            for (const Preset& preset : kernel_.presets)
                for (int l = 0; l < kWarp; ++l) w.set(preset.at, l, value(preset, w, l));
        }
    }
    uint64_t value(const Preset& preset, const Warp& w, int lane) const {
        switch (preset.source) {
            case Source::constant: return preset.value;
            case Source::shared: return preset.value;
            case Source::dynamic_shared: return uint64_t(kernel_.shared_bytes + 15) / 16 * 16;
            case Source::parameter: return uint64_t(launch_.parameters) + preset.value;
            case Source::thread: return uint64_t(w.index * kWarp + lane);
            case Source::threads: return uint64_t(launch_.threads);
            case Source::block: return uint64_t(w.block->index);
            case Source::blocks: return uint64_t(launch_.clusters * launch_.size);
            case Source::rank: return uint64_t(w.block->rank);
            case Source::size: return uint64_t(launch_.size);
        }
        return 0;
    }

    // Until every warp of the block is done or waits for the cluster.
    void run_block(Block& block) {
        std::vector<Warp*> warps;
        for (const size_t i : drawn_order(block.warps.size(), random_)) warps.push_back(&block.warps[i]);
        for (;;) {
            for (Warp* w : warps) {
                if (w->state != State::running) continue;
                try {
                    advance(*w, kernel_);
                } catch (const std::runtime_error& error) {
                    fail_in(*w, kernel_, error.what());
                }
            }
            if (!all_at(warps, State::at_block_barrier)) return;
            for (Warp* w : warps) release(*w);
        }
    }
    bool run_cluster() {
        std::vector<Warp*> warps;
        for (const size_t i : drawn_order(blocks_.size(), random_)) {
            run_block(blocks_[i]);
            // Others may not read it any more: see to it that they do not read what they hope for.
            if (blocks_[i].warps[0].state == State::done)
                std::fill(blocks_[i].shared.begin(), blocks_[i].shared.end(), 0x5d);
            for (Warp& w : blocks_[i].warps) warps.push_back(&w);
        }
        if (!all_at(warps, State::at_cluster_barrier)) return false;
        for (Warp* w : warps) release(*w);
        return true;
    }

    // Whether all of these warps stand at one barrier of the kind; fails where some cannot come.
    bool all_at(const std::vector<Warp*>& warps, State barrier) const {
        const Warp* first = nullptr;
        for (const Warp* w : warps)
            if (first == nullptr && w->state == barrier) first = w;
        if (first == nullptr) return false;
        for (const Warp* w : warps) {
            if (w->state != barrier) fail_in(*first, kernel_, "a barrier that others do not reach");
            if (w->now != first->now) fail_in(*w, kernel_, "diverged: warps wait at different barriers");
        }
        return true;
    }

    const Launch& launch_;
    const Kernel& kernel_;
    std::mt19937_64 random_;
    std::vector<Block> blocks_;  // of one cluster
};

}  // namespace

void run(const Launch& launch) { Machine(launch).run(); }

}  // namespace ptx
}  // namespace pse
