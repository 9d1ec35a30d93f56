// Fibers, the scheduler and the shadow memory behind harness.h.
#include "core/arithmetic.h"
//
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "harness.h"

#if defined(__SANITIZE_ADDRESS__)
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

struct Fiber {
    enum class State { ready, at_barrier, at_warp, done };

    Block* block = nullptr;
    int thread = 0;
    State state = State::ready;
    Place place = {"", 0};
    uint32_t warp_epoch = 0;
    uint64_t mine = 0;
    uint64_t all[kWarp];
    char* stack = nullptr;
#if defined(__x86_64__)
    void* saved = nullptr;
#else
    ucontext_t saved;
#endif
    void* fake_stack = nullptr;
};

struct Block {
    int64_t index = 0;
    uint32_t epoch = 0;
    uint8_t arrivals = 0;
    std::map<int64_t, uint32_t> seen;  // block -> how many of its arrivals this one has seen completed
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::map<const void*, SharedStore> shared;
    bool last = false;
    int running = 0;
};

struct Arrival {
    int64_t block;
    uint8_t arrivals;
};

struct Page {
    Shadow shadows[4096];
};

struct Launch {
    const char* kernel;
    int64_t blocks;
    int threads;
    Body body;
    const void* context;
    uint64_t random;
    std::string failure;
    std::map<uintptr_t, std::vector<Arrival>> tickets;
    uint32_t number;
    Fiber* current = nullptr;
    std::vector<char*> free_stacks;
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

// Shadow pages outlive a launch: making them anew for each took longer than the kernels.
struct Memory {
    static constexpr size_t kMost = 2048;  // pages, 500 MB
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    struct {
        uintptr_t number = 0;
        Page* page = nullptr;
    } recent[256];  // by the low bits of the page's number
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

static void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &now->bottom, &now->size);
#endif
    Fiber& fiber = *now->current;
    now->body(now->context);
    fiber.state = Fiber::State::done;
    to_scheduler(fiber);
    __builtin_unreachable();
}

static char* new_stack() {
    if (!now->free_stacks.empty()) {
        char* stack = now->free_stacks.back();
        now->free_stacks.pop_back();
        return stack;
    }
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(stack);
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
int threads() { return now->threads; }
int64_t block() { return now->current->block->index; }
int64_t blocks() { return now->blocks; }

static std::string at(Place place) {
    const char* slash = std::strrchr(place.file, '/');
    return std::string(slash == nullptr ? place.file : slash + 1) + ":" + std::to_string(place.line);
}
static std::string who(int64_t block, int thread) {
    return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

// The launch is given up: the scheduler sees the failure and never comes back to this fiber.
void fail(const std::string& what, Place place) {
    Fiber& fiber = *now->current;
    now->failure =
        std::string(now->kernel) + ", " + who(fiber.block->index, fiber.thread) + ", " + at(place) + ": " + what;
    to_scheduler(fiber);
    __builtin_unreachable();
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
        const auto& seen = now->current->block->seen;
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

SharedStore& shared_store(const void* site, const char* name, int64_t count, int64_t size) {
    SharedStore& memory = now->current->block->shared[site];
    if (memory.bytes.empty()) {
        memory.name = name;
        memory.bytes.assign(size_t(count * size), '\xa5');
        memory.shadows.resize(size_t(count));
    }
    return memory;
}

// ---- barriers and collectives

// Waits until every one of fibers [first, end) of the block waits in `state` at this place; the last to come lets all
// go on, after `release`.
template <class Release>
static void meet(Fiber::State state, int first, int end, const char* what, Place place, const Release& release) {
    Fiber& mine = *now->current;
    Block& block = *mine.block;
    mine.place = place;
    mine.state = state;
    bool complete = true;
    for (int i = first; i < end; ++i) {
        const Fiber& other = *block.fibers[size_t(i)];
        if (other.state == Fiber::State::done)
            fail(std::string(what) + " that thread " + std::to_string(i) + " cannot reach: it has left the kernel",
                 place);
        if (other.state == Fiber::State::ready || (other.state != state)) {
            complete = false;
            continue;
        }
        if (other.place.line != place.line || std::strcmp(other.place.file, place.file) != 0)
            fail(std::string("diverged ") + what + ": thread " + std::to_string(i) + " waits at " + at(other.place),
                 place);
    }
    if (!complete) {
        to_scheduler(mine);
        return;
    }
    release();
    for (int i = first; i < end; ++i) block.fibers[size_t(i)]->state = Fiber::State::ready;
    may_switch();
}

void sync_block(Place place) {
    Block& block = *now->current->block;
    meet(Fiber::State::at_barrier, 0, now->threads, "barrier", place, [&] { ++block.epoch; });
}

void exchange(uint64_t mine, uint64_t (&all)[kWarp], Place place) {
    Fiber& fiber = *now->current;
    Block& block = *fiber.block;
    const int first = fiber.thread / kWarp * kWarp;
    fiber.mine = mine;
    meet(Fiber::State::at_warp, first, first + kWarp, "warp collective", place, [&] {
        for (int to = first; to < first + kWarp; ++to)
            for (int from = 0; from < kWarp; ++from)
                block.fibers[size_t(to)]->all[from] = block.fibers[size_t(first + from)]->mine;
    });
    std::memcpy(all, fiber.all, sizeof fiber.all);
}

void sync_warp(Place place) {
    Fiber& fiber = *now->current;
    Block& block = *fiber.block;
    const int first = fiber.thread / kWarp * kWarp;
    meet(Fiber::State::at_warp, first, first + kWarp, "warp collective", place, [&] {
        for (int i = first; i < first + kWarp; ++i) ++block.fibers[size_t(i)]->warp_epoch;
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

static std::unique_ptr<Block> start_block(int64_t index) {
    std::unique_ptr<Block> block(new Block);
    block->index = index;
    block->running = now->threads;
    for (int t = 0; t < now->threads; ++t) {
        block->fibers.emplace_back(new Fiber);
        Fiber& fiber = *block->fibers.back();
        fiber.block = block.get();
        fiber.thread = t;
        prepare(fiber);
    }
    return block;
}

// Runs one block until all of it waits or is done, or for a while; false where nothing could run.
static bool run_some(Block& block, bool to_the_end) {
    bool ran = false;
    const int style = int(draw() % 3);  // threads ascending, descending, or from a drawn one on
    const int n = now->threads, first = style == 2 ? int(draw() % uint64_t(n)) : 0;
    do {
        bool progress = false;
        for (int k = 0; k < n && now->failure.empty(); ++k) {
            const int t = style == 1 ? n - 1 - k : (k + first) % n;
            Fiber& fiber = *block.fibers[size_t(t)];
            if (fiber.state != Fiber::State::ready) continue;
            to_fiber(fiber);
            progress = ran = true;
            if (fiber.state == Fiber::State::done) --block.running;
        }
        if (!progress) break;
    } while (to_the_end && block.running > 0 && now->failure.empty());
    return ran;
}

static void report_deadlock(const Block& block) {
    for (const auto& fiber : block.fibers)
        if (fiber->state != Fiber::State::done && now->failure.empty())
            now->failure =
                std::string(now->kernel) + ", " + who(block.index, fiber->thread) + ", " + at(fiber->place) +
                ": waits for ever: " + (fiber->state == Fiber::State::at_barrier ? "barrier" : "warp collective") +
                " that others of the block do not reach";
}

void run(const char* kernel, int64_t blocks, int threads, Body body, const void* context) {
    if (blocks == 0) return;
    if (threads < 1 || threads > 1024 || threads % kWarp != 0 || blocks < 0 || blocks > INT32_MAX)
        throw std::runtime_error(std::string(kernel) + ": cannot launch " + std::to_string(blocks) + " blocks of " +
                                 std::to_string(threads) + " threads");
    if (now != nullptr) throw std::runtime_error(std::string(kernel) + ": a launch inside a launch");
    if (memory_of_launches.pages.size() > Memory::kMost) memory_of_launches.forget();
    Launch launch;
    launch.number = ++memory_of_launches.launches;
    launch.kernel = kernel;
    launch.blocks = blocks;
    launch.threads = threads;
    launch.body = body;
    launch.context = context;
    launch.random = (schedule.seed + 1) * 0x9E3779B97F4A7C15ull + uint64_t(counts.launches);
    now = &launch;
    ++counts.launches;

    std::vector<int64_t> order(static_cast<size_t>(blocks));
    for (int64_t i = 0; i < blocks; ++i) order[size_t(i)] = i;
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[size_t(i)], order[size_t(draw() % uint64_t(i + 1))]);
    std::vector<std::unique_ptr<Block>> alive;
    std::vector<char*> stacks;
    const size_t most = schedule.interleaved ? size_t(kAlive) : 1;
    size_t next = 0;
    while (launch.failure.empty() && (next < order.size() || !alive.empty())) {
        while (alive.size() < most && next < order.size()) alive.push_back(start_block(order[next++]));
        const size_t chosen = size_t(draw() % alive.size());
        if (!run_some(*alive[chosen], most == 1) && alive[chosen]->running > 0) report_deadlock(*alive[chosen]);
        if (launch.failure.empty() && alive[chosen]->running == 0) {
            for (auto& fiber : alive[chosen]->fibers) launch.free_stacks.push_back(fiber->stack);
            alive.erase(alive.begin() + int64_t(chosen));
        }
    }
    for (auto& block : alive)
        for (auto& fiber : block->fibers) munmap(fiber->stack, kStack);
    for (char* stack : launch.free_stacks) munmap(stack, kStack);
    now = nullptr;
    if (!launch.failure.empty()) throw std::runtime_error(launch.failure);
}

}  // namespace simt
}  // namespace pse
