// What instructions see of the machine: a warp's registers and its block's memory.
#pragma once
#include <string.h>

#include "machine.h"

namespace pse {
namespace ptx {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Copy {
    char* to;
    const char* from;
    int bytes;
};

struct Block {
    std::vector<char> shared;  // what is written in it before the first instruction is arbitrary
    std::vector<Warp> warps;
    std::vector<Block>* cluster = nullptr;
    int64_t index = 0;
    int rank = 0;
    bool overlapping = false;
};

enum class State : uint8_t { running, at_block_barrier, at_cluster_barrier, done };

struct Warp {
    Block* block = nullptr;
    int index = 0;
    State state = State::running;
    int64_t done = 0;                              // instructions of this block
    int now = 0;                                   // the instruction that runs, or that it waits at
    uint32_t alive = 0, waiting = 0;               // lanes; waiting: at a collective
    uint32_t started = 0;                          // lanes that know that earlier launches are done
    uint32_t arrived = 0;                          // lanes that have announced a barrier of the cluster
    int at[kWarp] = {};                            // their next instruction
    std::vector<uint64_t> registers;               // 32 of each
    std::vector<std::vector<Copy>> copies[kWarp];  // groups of each lane, the open one last

    template <class T>
    T get(int r, int lane) const {
        T value;
        memcpy(&value, &registers[size_t(r) * kWarp + size_t(lane)], sizeof value);
        return value;
    }
    bool is_true(int r, int lane) const { return get<uint64_t>(r, lane) & 1; }
    template <class T>
    void set(int r, int lane, T value) {
        uint64_t bits = 0;
        memcpy(&bits, &value, sizeof value);
        registers[size_t(r) * kWarp + size_t(lane)] = bits;
    }
};

template <class F>
inline void each(uint32_t lanes, F f) {
    if (lanes == kAllLanes) {
        for (int lane = 0; lane < kWarp; ++lane) f(lane);
    } else {
        for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
    }
}

}  // namespace ptx
}  // namespace pse
