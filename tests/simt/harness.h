// Runs CUDA kernels on the CPU and checks them: the host's side of csrc/cuda/simt.cuh, name for name.
//
// Every thread is a fiber (harness.cpp), so barriers and collectives are real. What is checked, with kernel, block,
// thread and place of what went wrong:
//   bounds     every load and store, and the alignment of vectors
//   races      two threads of a block without a barrier between them, or two blocks that do not meet in last_block() or
//              cluster_sync(), at one address, when one of them writes and not both are atomic
//   barriers   all threads of a cluster or block, or all lanes of a warp, at the same place; nobody has left the kernel
//   unwritten  reads of shared memory that nothing has written
//   launches   global memory before after_earlier_launches(), or a kernel left without it
//   copies     reads of what is still being copied, and a thread that leaves with copies it has not waited for
//   clusters   ranks; reads of the shared memory of a block that has left the kernel, or may leave it before the read
// Schedules: threads and blocks run in an order drawn from a seed, one block after the other or all in turns. The
// blocks of a cluster always run in turns.
#pragma once
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/target.h"

namespace pse {
namespace simt {

#define PSE_DEVICE static inline
#define PSE_METHOD inline
#define PSE_KERNEL(...) static void
#define PSE_SHARED(T, name, count)                           \
    const auto name = ::pse::simt::shared_array<T, (count)>( \
        [] {                                                 \
            static char site;                                \
            return static_cast<const void*>(&site);          \
        }(),                                                 \
        #name)
#define PSE_COPIED_SHARED(T, name, count) PSE_SHARED(T, name, count)
#define PSE_LAUNCHED_SHARED(T, name)                   \
    const auto name = ::pse::simt::launched_shared<T>( \
        [] {                                           \
            static char site;                          \
            return static_cast<const void*>(&site);    \
        }(),                                           \
        #name)
#define PSE_UNROLL

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Place {
    const char* file;
    int line;
};
#define PSE_PLACE ::pse::simt::Place place = {__builtin_FILE(), __builtin_LINE()}

// A function that the running thread is in, known by the place of its call. Threads that wait in a collective must have
// come to it by the same calls: nvcc gives every call lines of its own.
struct Via {
    const Place place;
    const Via* const outer;
    Via(const char* file, int line);
    ~Via();
    Via(const Via&) = delete;
};
#define PSE_CALLER , [[maybe_unused]] ::pse::simt::Via pse_via = {__builtin_FILE(), __builtin_LINE()}

// ---- the thread that runs (harness.cpp)

int thread();
int threads();
int64_t block();
int64_t blocks();
inline int lane() { return thread() % kWarp; }
inline int warp() { return thread() / kWarp; }

[[noreturn]] void fail(const std::string& what, Place place);  // ends the launch; launch() throws
void after_earlier_launches();
void check_started(Place place);  // this thread has called it
void may_switch();                // lets another thread run now and then

// ---- what is known about the accesses of one element

struct Access {
    int32_t block = -1;        // -1: none
    uint32_t block_epoch = 0;  // barriers that the thread's block had passed
    uint32_t warp_epoch = 0;   // sync_warp()s that its warp had passed
    uint16_t thread = 0;
    uint16_t arrivals = 0;  // last_block()s that its block had entered
    bool atomic = false;
};
struct Shadow {
    Access writer, readers[2];
    bool written = false;
    uint32_t launch = 0;  // what is older than the launch that runs counts as nothing
};
Access here(bool atomic);
bool ordered(const Access& before, const Access& now);  // before happens before now, whatever the schedule
void check_read(Shadow& shadow, bool atomic, const char* memory, int64_t index, Place place);
void check_write(Shadow& shadow, bool atomic, const char* memory, int64_t index, Place place);
Shadow& global_shadow(uintptr_t address);  // of this launch
void count_access();

// ---- global memory

template <class T>
struct Global {
    T* data = nullptr;
    int64_t first = 0, end = 0;  // elements that may be touched, relative to data

    Global() = default;
    Global(T* d, int64_t f, int64_t e) : data(d), first(f), end(e) {}
    template <class U, class = std::enable_if_t<std::is_same<const U, T>::value && !std::is_same<U, T>::value>>
    Global(const Global<U>& other) : data(other.data), first(other.first), end(other.end) {}
    Global operator+(int64_t n) const { return {data + n, first - n, end - n}; }
    bool operator==(std::nullptr_t) const { return data == nullptr; }
    bool operator!=(std::nullptr_t) const { return data != nullptr; }
};

template <class T>
Global<T> global(const void* address, int64_t count) {
    return {static_cast<T*>(const_cast<void*>(address)), 0, address == nullptr ? 0 : count};
}
template <class T>
Global<T> global(int64_t address, int64_t count) {
    return global<T>(reinterpret_cast<const void*>(address), count);
}
template <class T>
Global<T> streamed(int64_t address, int64_t count) {
    return global<T>(address, count);
}

template <class T>
void check_bounds(const Global<T>& p, int64_t i, int64_t n, Place place) {
    check_started(place);
    if (i < p.first || i + n > p.end)
        fail("index " + std::to_string(i - p.first) + (n > 1 ? " (a vector of " + std::to_string(n) + ")" : "") +
                 " of a global buffer of " + std::to_string(p.end - p.first),
             place);
}

template <class T>
std::remove_const_t<T> load(const Global<T>& p, int64_t i, PSE_PLACE) {
    check_bounds(p, i, 1, place);
    check_read(global_shadow(reinterpret_cast<uintptr_t>(p.data + i)), false, "global memory", i, place);
    std::remove_const_t<T> value;  // a tensor in a file's map may stand at any address
    std::memcpy(&value, p.data + i, sizeof value);
    return value;
}
template <class T, class V>
void store(const Global<T>& p, int64_t i, V given, PSE_PLACE) {
    const T value = given;
    check_bounds(p, i, 1, place);
    check_write(global_shadow(reinterpret_cast<uintptr_t>(p.data + i)), false, "global memory", i, place);
    std::memcpy(p.data + i, &value, sizeof value);
}

template <class T, int N>
struct Vector {
    T at[N];
};
template <class T>
bool is_aligned(const Global<T>& p, int64_t i, int bytes) {
    return reinterpret_cast<uintptr_t>(p.data + i) % uintptr_t(bytes) == 0;
}
template <class T>
void check_vector(const Global<T>& p, int64_t i, int n, Place place) {
    check_bounds(p, i, n, place);
    const int bytes = n * int(sizeof(T));
    if (bytes > 16 || !is_aligned(p, i, bytes))
        fail("a vector of " + std::to_string(bytes) + " bytes at an address that is not a multiple of it", place);
}
template <int N, class T>
Vector<std::remove_const_t<T>, N> load_vector(const Global<T>& p, int64_t i, PSE_PLACE) {
    check_vector(p, i, N, place);
    Vector<std::remove_const_t<T>, N> value;
    for (int n = 0; n < N; ++n) value.at[n] = load(p, i + n, place);
    return value;
}
template <int N, class T>
void store_vector(const Global<T>& p, int64_t i, const Vector<T, N>& value, PSE_PLACE) {
    check_vector(p, i, N, place);
    for (int n = 0; n < N; ++n) store(p, i + n, value.at[n], place);
}

// ---- shared memory

struct SharedStore {
    const void* site;
    const char* name;
    std::string bytes;
    std::vector<Shadow> shadows;  // one per element
};
// Of the block that runs.
SharedStore& shared_store(const void* site, const char* name, int64_t count, int64_t size, Place place);

template <class T>
struct Shared {
    SharedStore* memory;
    int64_t offset, count;

    Shared operator+(int64_t n) const { return {memory, offset + n, count}; }
};
template <class T, int64_t N>
Shared<T> shared_array(const void* site, const char* name, PSE_PLACE) {
    return {&shared_store(site, name, N, int64_t(sizeof(T)), place), 0, N};
}
int64_t launched_shared_bytes();
template <class T>
Shared<T> launched_shared(const void* site, const char* name, PSE_PLACE) {
    const int64_t count = launched_shared_bytes() / int64_t(sizeof(T));
    return {&shared_store(site, name, count, int64_t(sizeof(T)), place), 0, count};
}
template <class P>
std::string shared_name(const P& p, int64_t i) {
    return std::string("shared ") + p.memory->name + "[" + std::to_string(i) + "]";
}
template <class T>
T* shared_element(const Shared<T>& p, int64_t i, Place place) {
    if (p.offset + i < 0 || p.offset + i >= p.count)
        fail("index " + std::to_string(p.offset + i) + " of " + shared_name(p, p.count), place);
    return reinterpret_cast<T*>(&p.memory->bytes[0]) + p.offset + i;
}
template <class T>
T load(const Shared<T>& p, int64_t i, PSE_PLACE) {
    const T* element = shared_element(p, i, place);
    Shadow& shadow = p.memory->shadows[size_t(p.offset + i)];
    if (!shadow.written) fail("unwritten read of " + shared_name(p, p.offset + i), place);
    check_read(shadow, false, p.memory->name, p.offset + i, place);
    return *element;
}
template <class T, class V>
void store(const Shared<T>& p, int64_t i, V given, PSE_PLACE) {
    T* element = shared_element(p, i, place);
    Shadow& shadow = p.memory->shadows[size_t(p.offset + i)];
    check_write(shadow, false, p.memory->name, p.offset + i, place);
    shadow.written = true;
    *element = T(given);
}

template <class T>
void check_vector(const Shared<T>& p, int64_t i, int n, Place place) {
    if ((p.offset + i) % n != 0)
        fail("a vector of " + std::to_string(n) + " at " + shared_name(p, p.offset + i) + ", not a multiple of it",
             place);
}
template <int N, class T>
Vector<T, N> load_vector(const Shared<T>& p, int64_t i, PSE_PLACE) {
    check_vector(p, i, N, place);
    Vector<T, N> value;
    for (int n = 0; n < N; ++n) value.at[n] = load(p, i + n, place);
    return value;
}

template <int N, class T>
void store_vector(const Shared<T>& p, int64_t i, const Vector<T, N>& value, PSE_PLACE) {
    check_vector(p, i, N, place);
    for (int n = 0; n < N; ++n) store(p, i + n, value.at[n], place);
}

// ---- copies from global to shared memory: they take place when they are waited for, and until then nobody may read

void start_copy(SharedStore& memory, int64_t first, int64_t count, const void* values);
void commit_copies();
void wait_for_copies(size_t left, Place place);

template <int N, class T>
void copy_async(const Shared<T>& to, int64_t i, const Global<const T>& from, int64_t j, PSE_PLACE) {
    constexpr int kBytes = int(sizeof(T)) * N;
    static_assert(kBytes == 4 || kBytes == 16, "what kernels copy");
    if ((to.offset + i) % N != 0)
        fail("a copy to " + shared_name(to, to.offset + i) + ", not a multiple of " + std::to_string(kBytes) + " bytes",
             place);
    const Vector<T, N> values = load_vector<N>(from, j, place);
    for (int n = 0; n < N; ++n) {
        shared_element(to, i + n, place);
        Shadow& shadow = to.memory->shadows[size_t(to.offset + i + n)];
        check_write(shadow, false, to.memory->name, to.offset + i + n, place);
        shadow.written = false;
    }
    start_copy(*to.memory, to.offset + i, N, &values);
}
template <int kLeft>
void wait_copies(PSE_PLACE) {
    wait_for_copies(kLeft, place);
}

// ---- what functions of csrc/core take for a pointer

template <class P, class T>
class Elements {
  public:
    struct Element {
        const P p;
        const int64_t i;
        const Place place;

        operator T() const { return load(p, i, place); }
        void operator=(T value) const { store(p, i, value, place); }
    };

    Elements(const P& p, Place place) : p_(p), place_(place) {}
    Element operator[](int64_t i) const { return {p_, i, place_}; }
    Elements operator+(int64_t n) const { return {p_ + n, place_}; }
    bool operator==(std::nullptr_t) const { return false; }
    bool operator!=(std::nullptr_t) const { return true; }

  private:
    P p_;
    Place place_;
};
template <class T>
Elements<Global<T>, std::remove_const_t<T>> elements(const Global<T>& p, PSE_PLACE) {
    return {p, place};
}
template <class T>
Elements<Shared<T>, T> elements(const Shared<T>& p, PSE_PLACE) {
    return {p, place};
}

// ---- barriers and collectives

void sync_block(PSE_PLACE);
void sync_warp(PSE_PLACE);

// Gives every lane the values of all 32, once they are all at this place.
void exchange(uint64_t mine, uint64_t (&all)[kWarp], Place place);

template <class T>
T exchanged(T value, int from, Place place) {
    static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
    uint64_t mine = 0, all[kWarp];
    std::memcpy(&mine, &value, sizeof value);
    exchange(mine, all, place);
    T result;
    std::memcpy(&result, &all[from], sizeof result);
    return result;
}
template <class T>
T shuffle(T value, int from, PSE_PLACE) {
    return exchanged(value, from % kWarp, place);
}
template <class T>
T shuffle_down(T value, int by, PSE_PLACE) {
    return exchanged(value, lane() + by < kWarp ? lane() + by : lane(), place);
}
template <class T>
T shuffle_up(T value, int by, PSE_PLACE) {
    return exchanged(value, lane() - by >= 0 ? lane() - by : lane(), place);
}
template <class T>
T shuffle_xor(T value, int mask, PSE_PLACE) {
    return exchanged(value, lane() ^ mask, place);
}
inline uint32_t ballot(bool vote, PSE_PLACE) {
    uint64_t all[kWarp];
    exchange(vote, all, place);
    uint32_t votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= uint32_t(all[i]) << i;
    return votes;
}

void multiply_add_tiles(double (&d)[4], double upper, double lower, double right, PSE_PLACE);

// ---- atomics

template <class T>
struct IsAtomic : std::false_type {};
template <>
struct IsAtomic<int32_t> : std::true_type {};
template <>
struct IsAtomic<uint32_t> : std::true_type {};
template <>
struct IsAtomic<int64_t> : std::true_type {};
template <>
struct IsAtomic<uint64_t> : std::true_type {};

template <class T, class Change>
T atomic(const Global<T>& p, int64_t i, const Change& change, Place place) {
    static_assert(IsAtomic<T>::value, "atomics are on integers of 32 and 64 bits");
    may_switch();
    check_bounds(p, i, 1, place);
    if (!is_aligned(p, i, sizeof(T))) fail("an atomic at an address that is not a multiple of its size", place);
    check_write(global_shadow(reinterpret_cast<uintptr_t>(p.data + i)), true, "global memory", i, place);
    const T before = p.data[i];
    p.data[i] = change(before);
    return before;
}
template <class T, class Change>
T atomic(const Shared<T>& p, int64_t i, const Change& change, Place place) {
    static_assert(IsAtomic<T>::value, "atomics are on integers of 32 and 64 bits");
    may_switch();
    T* element = shared_element(p, i, place);
    Shadow& shadow = p.memory->shadows[size_t(p.offset + i)];
    if (!shadow.written) fail("unwritten read of " + shared_name(p, p.offset + i), place);
    check_write(shadow, true, p.memory->name, p.offset + i, place);
    const T before = *element;
    *element = change(before);
    return before;
}
template <class P, class V>
auto atomic_add(const P& p, int64_t i, V value, PSE_PLACE) {
    return atomic(p, i, [=](auto x) { return decltype(x)(uint64_t(x) + uint64_t(value)); }, place);
}
template <class P>
int32_t atomic_max(const P& p, int64_t i, int32_t value, PSE_PLACE) {
    return atomic(p, i, [=](int32_t x) { return value > x ? value : x; }, place);
}
template <class P>
int32_t atomic_min(const P& p, int64_t i, int32_t value, PSE_PLACE) {
    return atomic(p, i, [=](int32_t x) { return value < x ? value : x; }, place);
}
template <class P>
uint32_t atomic_or(const P& p, int64_t i, uint32_t value, PSE_PLACE) {
    return atomic(p, i, [=](uint32_t x) { return x | value; }, place);
}

// All threads of the block enter together; the block that completes the count sees what the others did before.
bool last_block(const Global<uint32_t>& tickets, int64_t i, uint32_t count, PSE_PLACE);

// ---- clusters

constexpr bool kHaveClusters = true;
int cluster_rank();
int cluster_size();
void cluster_sync(PSE_PLACE);

// An array of another block of the cluster: it can be read, nothing else.
template <class T>
struct Remote {
    SharedStore* memory;
    int64_t offset, count;
    int rank;
};
// The store of the same array in the block of that rank. It must not have left the kernel.
SharedStore& remote_store(const SharedStore& own, int rank, Place place);
void note_visit(int rank, Place place);  // a read: the block may not leave before the next cluster_sync()

template <class T>
Remote<T> of_rank(const Shared<T>& p, int rank, PSE_PLACE) {
    return {&remote_store(*p.memory, rank, place), p.offset, p.count, rank};
}
template <class T>
T load(const Remote<T>& p, int64_t i, PSE_PLACE) {
    remote_store(*p.memory, p.rank, place);  // it may have left since of_rank()
    note_visit(p.rank, place);
    return load(Shared<T>{p.memory, p.offset, p.count}, i, place);
}

inline int count_bits(uint32_t x) { return __builtin_popcount(x); }
inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }
inline int count_leading_zeros(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int count_leading_zeros(uint64_t x) { return x == 0 ? 64 : __builtin_clzll(x); }

// ---- launches

struct Shape {
    int64_t clusters;
    int size;  // blocks of a cluster
    int threads;
    int64_t shared_bytes;  // of PSE_LAUNCHED_SHARED
};
using Body = void (*)(const void* context);
void run(const char* kernel, const Shape& shape, Body body, const void* context);  // throws what went wrong

template <class... Parameters, class... Arguments>
int launch_clusters(const char* name, const Target&, int64_t clusters, int size, int threads, int64_t bytes,
                    void (*kernel)(Parameters...), Arguments... arguments) {
    const auto call = [&] { kernel(Parameters(arguments)...); };
    const Shape shape = {clusters, size, threads, bytes};
    run(name, shape, [](const void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
    return 0;
}
template <class... Parameters, class... Arguments>
int launch(const char* name, const Target& target, int64_t blocks, int threads, void (*kernel)(Parameters...),
           Arguments... arguments) {
    return launch_clusters(name, target, blocks, 1, threads, 0, kernel, arguments...);
}

constexpr int64_t kMostShared = 227 << 10;  // bytes of a block, as on compute capability 9.0
template <class... Parameters>
int64_t cluster_shared_limit(int, void (*)(Parameters...)) {
    return kMostShared - (48 << 10);  // what else the kernel has is known only while it runs
}

inline int fill_zero(const Target&, void* data, int64_t bytes) {
    std::memset(data, 0, size_t(bytes));
    return 0;
}

// How the next launches are scheduled; counts of what was done, for the tests.
struct Schedule {
    uint64_t seed = 0;
    bool interleaved =
        false;  // up to kAlive blocks at once, else one (or one cluster) after the other in a drawn order
};
extern Schedule schedule;
struct Counts {
    int64_t launches = 0, switches = 0, accesses = 0;
};
extern Counts counts;

}  // namespace simt
}  // namespace pse
