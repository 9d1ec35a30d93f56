// Fibers, the scheduler and the shadow memory behind harness.h.
#include "core/arithmetic.h"
//
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "harness.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pse {
namespace simt {

Schedule schedule;
Counts counts;

// ---- fibers

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer in *from, then goes on from `to`. swapcontext() would make a
// system call per switch.
extern "C" void pse_switch(void** from, void* to);
__asm__(R"(
.text
.globl pse_switch
.type pse_switch, @function
pse_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size pse_switch, .-pse_switch
)");
#endif

constexpr size_t kStack = 256 << 10;  // frames under the sanitizers are large; untouched pages cost nothing
constexpr int64_t kAlive = 6;         // blocks that run in turns

struct Block;
struct Cluster;
struct Fiber;

// Threads that wait for each other.
struct Meeting {
    int waiting = 0, left = 0;  // left: threads that have left the kernel
    Fiber* first = nullptr;     // of those that wait
};

// What a thread has started to copy to shared memory.
struct Copy {
    SharedStore* memory;
    int64_t first, count;
    std::string bytes;
};

// What a lane brings to multiply_add_tiles().
struct TileOperands {
    double* d;
    double upper, lower, right;
};

struct Fiber {
    enum class State { ready, at_cluster, at_barrier, at_warp, done };

    Block* block = nullptr;
    int thread = 0;
    State state = State::ready;
    bool started = false;  // has called after_earlier_launches()
    Place place = {"", 0};
    const Via* via = nullptr;  // the innermost
    uint32_t warp_epoch = 0;
    uint64_t mine = 0;
    uint64_t all[kWarp];
    TileOperands* tiles = nullptr;
    char* stack = nullptr;
#if defined(__x86_64__)
    void* saved = nullptr;
#else
    ucontext_t saved;
#endif
    void* fake_stack = nullptr;
    std::vector<Copy> copies;                  // since the latest commit
    std::vector<std::vector<Copy>> committed;  // and not waited for
};

// A read of a block's shared memory by another block of its cluster.
struct Visit {
    const Fiber* by = nullptr;
    Place place = {"", 0};
};

struct Block {
    Cluster* cluster = nullptr;
    int64_t index = 0;
    uint32_t epoch = 0;  // barriers that it has passed, those of its cluster too
    uint32_t met = 0;    // its epoch after the latest barrier of its cluster
    Visit visit;         // one since that barrier
    Meeting barrier;
    std::vector<Meeting> warps;
    int64_t shared_bytes = 0;
    uint16_t arrivals = 0;
    std::map<int64_t, uint32_t> seen;  // block -> how many of its arrivals this one has seen completed
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::map<const void*, SharedStore> shared;
    bool last = false;
    int running = 0;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    Meeting barrier;
    int running = 0;  // threads
};

struct Arrival {
    int64_t block;
    uint16_t arrivals;
};

struct Page {
    Shadow shadows[4096];
};

struct Launch {
    const char* kernel;
    Shape shape;
    Body body;
    const void* context;
    uint64_t random;
    std::string failure;
    std::map<uintptr_t, std::vector<Arrival>> tickets;
    uint32_t number;
    Fiber* current = nullptr;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
};

static Launch* now = nullptr;

// Shadow pages and stacks outlive a launch: making them anew for each took longer than the kernels.
struct Memory {
    static constexpr size_t kMost = 2048;  // pages, 500 MB
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    struct {
        uintptr_t number = 0;
        Page* page = nullptr;
    } recent[256];              // by the low bits of the page's number
    std::vector<char*> stacks;  // of fibers that are done, or were given up
    uint32_t launches = 0;

    void forget() {
        pages.clear();
        for (auto& one : recent) one.page = nullptr;
    }
};
static Memory memory_of_launches;

static uint64_t draw() {  // xorshift64*
    uint64_t& x = now->random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return x * 0x2545F4914F6CDD1Dull;
}

static void to_scheduler(Fiber& fiber) {
    ++counts.switches;
#if defined(__SANITIZE_ADDRESS__)
    const bool over = fiber.state == Fiber::State::done;
    __sanitizer_start_switch_fiber(over ? nullptr : &fiber.fake_stack, now->bottom, now->size);
#endif
#if defined(__x86_64__)
    pse_switch(&fiber.saved, now->scheduler);
#else
    swapcontext(&fiber.saved, &now->scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &now->bottom, &now->size);
#endif
}

static void to_fiber(Fiber& fiber) {
    now->current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&now->fake_stack, fiber.stack, kStack);
#endif
#if defined(__x86_64__)
    pse_switch(&now->scheduler, fiber.saved);
#else
    swapcontext(&now->scheduler, &fiber.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(now->fake_stack, nullptr, nullptr);
#endif
    now->current = nullptr;
}

static void leave(Fiber& fiber);

static void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &now->bottom, &now->size);
#endif
    Fiber& fiber = *now->current;
    now->body(now->context);
    leave(fiber);
    to_scheduler(fiber);
    __builtin_unreachable();
}

static char* new_stack() {
    std::vector<char*>& done = memory_of_launches.stacks;
    if (done.empty()) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) throw std::bad_alloc();
        done.push_back(static_cast<char*>(stack));
    }
    char* stack = done.back();
    done.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStack);  // marks of frames that a launch gave up
#endif
    return stack;
}

static void prepare(Fiber& fiber) {
    fiber.stack = new_stack();
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(fiber.stack + kStack);
    *--top = nullptr;  // the stack is off by 8 at the entry of a function
    *--top = reinterpret_cast<void*>(&begin);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.saved = top;
#else
    getcontext(&fiber.saved);
    fiber.saved.uc_stack.ss_sp = fiber.stack;
    fiber.saved.uc_stack.ss_size = kStack;
    fiber.saved.uc_link = nullptr;
    makecontext(&fiber.saved, begin, 0);
#endif
}

// ---- where a thread is

int thread() { return now->current->thread; }
int threads() { return now->shape.threads; }
int64_t block() { return now->current->block->index; }
int64_t blocks() { return now->shape.clusters * now->shape.size; }
int cluster_rank() { return int(block() % now->shape.size); }
int cluster_size() { return now->shape.size; }
int64_t launched_shared_bytes() { return now->shape.shared_bytes; }

static std::string at(Place place) {
    const char* slash = std::strrchr(place.file, '/');
    return std::string(slash == nullptr ? place.file : slash + 1) + ":" + std::to_string(place.line);
}
static std::string who(int64_t block, int thread) {
    return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

static std::string who(const Fiber& fiber) { return who(fiber.block->index, fiber.thread); }

static void report(const Fiber& fiber, Place place, const std::string& what) {
    if (now->failure.empty())
        now->failure = std::string(now->kernel) + ", " + who(fiber) + ", " + at(place) + ": " + what;
}

// The launch is given up: the scheduler sees the failure and never comes back to this fiber.
void fail(const std::string& what, Place place) {
    report(*now->current, place, what);
    to_scheduler(*now->current);
    __builtin_unreachable();
}

void after_earlier_launches() { now->current->started = true; }
void check_started(Place place) {
    if (!now->current->started) fail("global memory before after_earlier_launches()", place);
}

void may_switch() {
    if (draw() % 4 == 0) to_scheduler(*now->current);
}

// ---- shadow memory

Access here(bool atomic) {
    const Fiber& fiber = *now->current;
    return {int32_t(fiber.block->index), fiber.block->epoch,    fiber.warp_epoch,
            uint16_t(fiber.thread),      fiber.block->arrivals, atomic};
}

bool ordered(const Access& before, const Access& later) {
    if (before.block < 0) return true;
    if (before.block != later.block) {
        const Block& mine = *now->current->block;
        const int64_t rank = before.block - mine.cluster->blocks[0]->index;
        if (rank >= 0 && rank < now->shape.size && before.block_epoch < mine.cluster->blocks[size_t(rank)]->met)
            return true;
        const auto& seen = mine.seen;
        const auto found = seen.find(before.block);
        return found != seen.end() && before.arrivals < found->second;
    }
    if (before.thread == later.thread || before.block_epoch < later.block_epoch) return true;
    return before.thread / kWarp == later.thread / kWarp && before.warp_epoch < later.warp_epoch;
}

static void race(const Access& other, const char* first, const char* second, const char* memory, int64_t index,
                 Place place) {
    fail(std::string("race at ") + memory + "[" + std::to_string(index) + "]: " + second + " here, " + first + " by " +
             who(other.block, other.thread) + ", and nothing orders them",
         place);
}

void check_read(Shadow& shadow, bool atomic, const char* memory, int64_t index, Place place) {
    ++counts.accesses;
    const Access mine = here(atomic);
    if (!ordered(shadow.writer, mine) && !(shadow.writer.atomic && atomic))
        race(shadow.writer, shadow.writer.atomic ? "an atomic" : "a write", "a read", memory, index, place);
    for (Access& reader : shadow.readers)
        if (ordered(reader, mine)) {
            reader = mine;
            return;
        }
    shadow.readers[draw() % 2] = mine;
}

void check_write(Shadow& shadow, bool atomic, const char* memory, int64_t index, Place place) {
    ++counts.accesses;
    const Access mine = here(atomic);
    const char* own = atomic ? "an atomic" : "a write";
    if (!ordered(shadow.writer, mine) && !(shadow.writer.atomic && atomic))
        race(shadow.writer, shadow.writer.atomic ? "an atomic" : "a write", own, memory, index, place);
    for (const Access& reader : shadow.readers)
        if (!ordered(reader, mine)) race(reader, "a read", own, memory, index, place);
    shadow.writer = mine;
    shadow.written = true;
}

Shadow& global_shadow(uintptr_t address) {
    Memory& memory = memory_of_launches;
    const uintptr_t number = address >> 12;
    auto& recent = memory.recent[number % 256];
    if (recent.page == nullptr || recent.number != number) {
        std::unique_ptr<Page>& found = memory.pages[number];
        if (found == nullptr) found.reset(new Page);
        recent = {number, found.get()};
    }
    Shadow& shadow = recent.page->shadows[address & 4095];
    if (shadow.launch != now->number) {
        shadow = Shadow();
        shadow.launch = now->number;
    }
    return shadow;
}

static SharedStore& store_of(Block& block, const void* site, const char* name, size_t count, size_t bytes) {
    SharedStore& memory = block.shared[site];
    if (memory.site == nullptr) {
        memory.site = site;
        memory.name = name;
        memory.bytes.assign(bytes, '\xa5');
        memory.shadows.resize(count);
        block.shared_bytes += int64_t(bytes);
    }
    return memory;
}

SharedStore& shared_store(const void* site, const char* name, int64_t count, int64_t size, Place place) {
    Block& block = *now->current->block;
    SharedStore& memory = store_of(block, site, name, size_t(count), size_t(count * size));
    if (block.shared_bytes > kMostShared)
        fail("the block has " + std::to_string(block.shared_bytes) + " bytes of shared memory", place);
    return memory;
}

// ---- copies

void start_copy(SharedStore& memory, int64_t first, int64_t count, const void* values) {
    const size_t size = memory.bytes.size() / memory.shadows.size() * size_t(count);
    now->current->copies.push_back({&memory, first, count, std::string(static_cast<const char*>(values), size)});
}

void commit_copies() {
    Fiber& fiber = *now->current;
    fiber.committed.push_back(std::move(fiber.copies));
    fiber.copies.clear();
}

void wait_for_copies(size_t left, Place place) {
    std::vector<std::vector<Copy>>& groups = now->current->committed;
    for (; groups.size() > left; groups.erase(groups.begin()))
        for (const Copy& copy : groups.front()) {
            for (int64_t i = copy.first; i < copy.first + copy.count; ++i)
                check_write(copy.memory->shadows[size_t(i)], false, copy.memory->name, i, place);
            const size_t size = copy.bytes.size() / size_t(copy.count);
            std::memcpy(&copy.memory->bytes[size_t(copy.first) * size], copy.bytes.data(), copy.bytes.size());
        }
    may_switch();
}

static bool still_copies(const Fiber& fiber) {
    const auto some = [](const std::vector<Copy>& group) { return !group.empty(); };
    return some(fiber.copies) || std::any_of(fiber.committed.begin(), fiber.committed.end(), some);
}

// ---- barriers and collectives

static std::string named(const Fiber& fiber, const Fiber& reader) {
    return fiber.block == reader.block ? "thread " + std::to_string(fiber.thread) : who(fiber);
}

static bool is_same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

Via::Via(const char* file, int line) : place{file, line}, outer(now->current->via) { now->current->via = this; }
Via::~Via() { now->current->via = outer; }

// Waits until `count` threads wait in this meeting at this place; the last to come lets all go on, after `release`.
// `each` is a function that calls its argument with every fiber of the meeting.
template <class Each, class Release>
static void meet(Meeting& meeting, int count, Fiber::State state, const char* what, Place place, const Each& each,
                 const Release& release) {
    Fiber& mine = *now->current;
    if (meeting.left > 0)
        each([&](const Fiber& other) {
            if (other.state == Fiber::State::done)
                fail(std::string(what) + " that " + named(other, mine) + " cannot reach: it has left the kernel",
                     place);
        });
    if (meeting.waiting == 0) meeting.first = &mine;
    const Place agreed = meeting.waiting == 0 ? place : meeting.first->place;
    const auto waits = [&](const std::string& where, Place here) {
        fail(std::string("diverged ") + what + ": " + named(*meeting.first, mine) + " waits at " + where, here);
    };
    if (!is_same(agreed, place)) waits(at(agreed), place);
    const Via *other = meeting.first->via, *own = mine.via;
    for (; other != nullptr && own != nullptr && is_same(other->place, own->place); other = other->outer)
        own = own->outer;
    if (other != own)
        waits(at(agreed) + (other == nullptr ? "" : ", called at " + at(other->place)),
              own == nullptr ? place : own->place);
    mine.place = place;
    mine.state = state;
    if (++meeting.waiting < count) {
        to_scheduler(mine);
        return;
    }
    release();
    meeting.waiting = 0;
    each([](Fiber& fiber) { fiber.state = Fiber::State::ready; });
    may_switch();
}

// Calls f with threads [first, first + count) of a block.
template <class F>
static void each_thread(const Block& block, int first, int count, const F& f) {
    for (int i = first; i < first + count; ++i) f(*block.fibers[size_t(i)]);
}

void sync_block(Place place) {
    Block& block = *now->current->block;
    const auto each = [&](const auto& f) { each_thread(block, 0, threads(), f); };
    meet(block.barrier, threads(), Fiber::State::at_barrier, "barrier", place, each, [&] { ++block.epoch; });
}

void cluster_sync(Place place) {
    Cluster& cluster = *now->current->block->cluster;
    const auto each = [&](const auto& f) {
        for (const auto& block : cluster.blocks) each_thread(*block, 0, threads(), f);
    };
    meet(cluster.barrier, threads() * cluster_size(), Fiber::State::at_cluster, "cluster barrier", place, each, [&] {
        for (const auto& block : cluster.blocks) {
            block->met = ++block->epoch;
            block->visit = Visit();
        }
    });
}

SharedStore& remote_store(const SharedStore& own, int rank, Place place) {
    if (rank < 0 || rank >= cluster_size())
        fail("rank " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_size()), place);
    Block& block = *now->current->block->cluster->blocks[size_t(rank)];
    if (block.running == 0)
        fail(std::string("a read of shared ") + own.name + " of block " + std::to_string(block.index) +
                 ", which has left the kernel",
             place);
    return store_of(block, own.site, own.name, own.shadows.size(), own.bytes.size());
}

void note_visit(int rank, Place place) {
    Block& block = *now->current->block->cluster->blocks[size_t(rank)];
    if (&block != now->current->block) block.visit = {now->current, place};
}

// The last thing that a thread does.
static void leave(Fiber& fiber) {
    Block& block = *fiber.block;
    fiber.state = Fiber::State::done;
    if (!fiber.started) report(fiber, {"end", 0}, "the kernel is left without after_earlier_launches()");
    if (still_copies(fiber)) report(fiber, fiber.place, "it leaves the kernel without waiting for its copies");
    ++block.barrier.left;
    ++block.cluster->barrier.left;
    ++block.warps[size_t(fiber.thread / kWarp)].left;
    --block.cluster->running;
    if (--block.running == 0 && block.visit.by != nullptr)
        report(*block.visit.by, block.visit.place,
               "a read of the shared memory of block " + std::to_string(block.index) +
                   ", which leaves the kernel without a cluster barrier after it");
}

// All lanes of a warp; `release` is called with the warp's first fiber in the block, once they have come.
template <class Release>
static void meet_warp(Place place, const Release& release) {
    Fiber& fiber = *now->current;
    Block& block = *fiber.block;
    const int first = fiber.thread / kWarp * kWarp;
    const auto each = [&](const auto& f) { each_thread(block, first, kWarp, f); };
    meet(block.warps[size_t(warp())], kWarp, Fiber::State::at_warp, "warp collective", place, each,
         [&] { release(&block.fibers[size_t(first)]); });
}

void exchange(uint64_t mine, uint64_t (&all)[kWarp], Place place) {
    Fiber& fiber = *now->current;
    fiber.mine = mine;
    meet_warp(place, [](const auto* lanes) {
        for (int to = 0; to < kWarp; ++to)
            for (int from = 0; from < kWarp; ++from) lanes[to]->all[from] = lanes[from]->mine;
    });
    std::memcpy(all, fiber.all, sizeof fiber.all);
}

void multiply_add_tiles(double (&d)[4], double upper, double lower, double right, Place place) {
    TileOperands mine = {d, upper, lower, right};
    now->current->tiles = &mine;
    meet_warp(place, [](const auto* lanes) {
        for (int to = 0; to < kWarp; ++to)
            for (int e = 0; e < 4; ++e)
                for (int c = 0; c < 4; ++c) {
                    const TileOperands& a = *lanes[to / 4 * 4 + c]->tiles;
                    const TileOperands& b = *lanes[(to % 4 * 2 + e % 2) * 4 + c]->tiles;
                    double& sum = lanes[to]->tiles->d[e];
                    sum = std::fma(e < 2 ? a.upper : a.lower, b.right, sum);
                }
    });
}

void sync_warp(Place place) {
    meet_warp(place, [](const auto* lanes) {
        for (int i = 0; i < kWarp; ++i) ++lanes[i]->warp_epoch;
    });
}

bool last_block(const Global<uint32_t>& tickets, int64_t i, uint32_t count, Place place) {
    Block& block = *now->current->block;
    sync_block(place);
    if (thread() == 0) {
        if (++block.arrivals == 0) fail("more last_block()s than the harness counts", place);
        std::vector<Arrival>& arrived = now->tickets[reinterpret_cast<uintptr_t>(tickets.data + i)];
        arrived.push_back({block.index, block.arrivals});
        const uint32_t before = atomic_add(tickets, i, 1u, place);
        if (before >= count)
            fail("ticket " + std::to_string(i) + " stood at " + std::to_string(before) + " of " +
                     std::to_string(count) + ": it must be 0 before a launch, and every block may come once",
                 place);
        block.last = before == count - 1;
        if (block.last) {
            tickets.data[i] = 0;
            for (const Arrival& arrival : arrived) block.seen[arrival.block] = arrival.arrivals;
            arrived.clear();
        }
    }
    sync_block(place);
    return block.last;
}

// ---- the scheduler

static std::unique_ptr<Cluster> start_cluster(int64_t index) {
    std::unique_ptr<Cluster> cluster(new Cluster);
    for (int rank = 0; rank < now->shape.size; ++rank) {
        cluster->blocks.emplace_back(new Block);
        Block& block = *cluster->blocks.back();
        block.cluster = cluster.get();
        block.index = index * now->shape.size + rank;
        block.running = threads();
        block.warps.resize(size_t(threads() / kWarp));
        for (int t = 0; t < threads(); ++t) {
            block.fibers.emplace_back(new Fiber);
            Fiber& fiber = *block.fibers.back();
            fiber.block = &block;
            fiber.thread = t;
            prepare(fiber);
        }
        cluster->running += threads();
    }
    return cluster;
}

// Runs one block until all of it waits or is done, or for a while; false where nothing could run.
static bool run_some(Block& block, bool to_the_end) {
    const int style = int(draw() % 3);  // threads ascending, descending, or from a drawn one on
    const int n = threads(), first = style == 2 ? int(draw() % uint64_t(n)) : 0;
    bool ran = false, progress = true;
    do {
        progress = false;
        for (int k = 0; k < n && now->failure.empty(); ++k) {
            const int t = style == 1 ? n - 1 - k : (k + first) % n;
            Fiber& fiber = *block.fibers[size_t(t)];
            if (fiber.state != Fiber::State::ready) continue;
            to_fiber(fiber);
            progress = ran = true;
        }
    } while (progress && to_the_end && block.running > 0 && now->failure.empty());
    return ran;
}

// Nothing of the cluster can run: that is a failure where something of it waits.
static void report_deadlock(const Cluster& cluster) {
    const Fiber* waits = nullptr;
    for (const auto& block : cluster.blocks)
        for (const auto& fiber : block->fibers) {
            if (fiber->state == Fiber::State::ready) return;
            if (fiber->state != Fiber::State::done && waits == nullptr) waits = fiber.get();
        }
    if (waits == nullptr) return;
    const char* what = waits->state == Fiber::State::at_cluster   ? "cluster barrier that others of the cluster"
                       : waits->state == Fiber::State::at_barrier ? "barrier that others of the block"
                                                                  : "warp collective that others of the block";
    report(*waits, waits->place, std::string("waits for ever: ") + what + " do not reach");
}

static void keep_stacks(const Cluster& cluster) {
    for (auto& block : cluster.blocks)
        for (auto& fiber : block->fibers) memory_of_launches.stacks.push_back(fiber->stack);
}

void run(const char* kernel, const Shape& shape, Body body, const void* context) {
    if (shape.clusters == 0) return;
    if (shape.threads < 1 || shape.threads > 1024 || shape.threads % kWarp != 0 || shape.clusters < 0 ||
        shape.size < 1 || shape.size > 8 || shape.clusters * shape.size > INT32_MAX || shape.shared_bytes < 0)
        throw std::runtime_error(std::string(kernel) + ": cannot launch " + std::to_string(shape.clusters) +
                                 " clusters of " + std::to_string(shape.size) + " blocks of " +
                                 std::to_string(shape.threads) + " threads");
    if (now != nullptr) throw std::runtime_error(std::string(kernel) + ": a launch inside a launch");
    if (memory_of_launches.pages.size() > Memory::kMost) memory_of_launches.forget();
    Launch launch;
    launch.number = ++memory_of_launches.launches;
    launch.kernel = kernel;
    launch.shape = shape;
    launch.body = body;
    launch.context = context;
    launch.random = (schedule.seed + 1) * 0x9E3779B97F4A7C15ull + uint64_t(counts.launches);
    now = &launch;
    ++counts.launches;

    std::vector<int64_t> order(static_cast<size_t>(shape.clusters));
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[size_t(draw() % uint64_t(i + 1))]);
    std::vector<std::unique_ptr<Cluster>> alive;
    const size_t size = size_t(shape.size);
    const size_t most = schedule.interleaved ? std::max<size_t>(kAlive / size, 2) : 1;
    size_t next = 0;
    while (launch.failure.empty() && (next < order.size() || !alive.empty())) {
        while (alive.size() < most && next < order.size()) alive.push_back(start_cluster(order[next++]));
        const size_t drawn = size_t(draw() % (alive.size() * size));
        Cluster& cluster = *alive[drawn / size];
        if (!run_some(*cluster.blocks[drawn % size], !schedule.interleaved)) report_deadlock(cluster);
        if (!launch.failure.empty()) break;
        if (cluster.running > 0) continue;
        keep_stacks(cluster);
        alive.erase(alive.begin() + int64_t(drawn / size));
    }
    for (auto& cluster : alive) keep_stacks(*cluster);
    now = nullptr;
    if (!launch.failure.empty()) throw std::runtime_error(launch.failure);
}

}  // namespace simt
}  // namespace pse
