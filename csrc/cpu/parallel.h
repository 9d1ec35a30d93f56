// Threads: torch's OpenMP runtime, entered through its C entry point, so that no second runtime is ever loaded.
// Law: with threads == 1 there is no parallel region at all (fork-safe), and every body runs under IEEE default
// floating point, whatever flush-to-zero mode the caller's thread is in.
#pragma once
#include <stdint.h>

#include "core/macros.h"

namespace pse {

using ParallelBody = void (*)(void* context, int thread, int num_threads);

// Runs body once per thread of a team of at most `threads`. Defined once, in baseline/parallel.cpp.
void parallel_run(int threads, ParallelBody body, void* context);

namespace PSE_ISA {

template <class Body>
static inline void parallel_team(int threads, Body& body) {
    parallel_run(
        threads,
        [](void* context, int thread, int num_threads) { (*static_cast<Body*>(context))(thread, num_threads); }, &body);
}

// Calls body(task, thread) for every task in [0, tasks). Tasks go to threads by a shared counter: results may depend on
// the task, never on the thread, which only names private scratch.
template <class Body>
static inline void parallel_for_with_thread(int64_t tasks, int threads, const Body& body) {
    if (tasks < threads) threads = tasks < 1 ? 1 : int(tasks);
    int64_t next = 0;
    auto team = [&](int thread, int) {
        for (;;) {
            const int64_t task = __atomic_fetch_add(&next, int64_t(1), __ATOMIC_RELAXED);
            if (task >= tasks) return;
            body(task, thread);
        }
    };
    parallel_team(threads, team);
}

template <class Body>
static inline void parallel_for(int64_t tasks, int threads, const Body& body) {
    parallel_for_with_thread(tasks, threads, [&](int64_t task, int) { body(task); });
}

}  // namespace PSE_ISA
}  // namespace pse
