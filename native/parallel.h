// A small fork-safe pool of threads, shared by the whole process. No Python, no OpenMP.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace crossent {

// CPUs this process may use: the affinity mask, cut to the container's CPU quota rounded up. >= 1.
int available_cpus();

// The number of threads parallel_for uses at most, the calling one included. Decided at first use:
// CROSSENT_NUM_THREADS, else the first number of OMP_NUM_THREADS, else available_cpus(). A
// malformed variable is passed over. In a forked child: CROSSENT_NUM_THREADS, else 1, so that the
// workers of a data loader do not multiply.
int num_threads();

// n >= 1. Takes effect at the next parallel_for. A forked child does not inherit it.
void set_num_threads(int n);

// Calls body(context, i) once for each i in [0, n), on the calling thread and up to
// num_threads() - 1 others, and returns true when all are done. Any number of threads may call at
// once; one of them gets the pool. The rest, and a call from inside a body, run on their own
// thread.
//
// Which thread runs which i varies from run to run, so results must not depend on it. To that end a
// body finds the default floating-point environment on every thread (rounding to nearest, no flush
// to zero), whatever the caller's is. A body must not throw and must not fork.
//
// poll(poll_context), if given, is called on the calling thread alone, between its bodies and while
// it waits for the others, about every 50 ms (a longer body delays it). Where it returns false no
// further i is started and parallel_for returns false once the running bodies have ended. It must
// not throw. It may call parallel_for, and may fork: in the child, where the other threads and
// their share of the work are gone, parallel_for then returns false.
bool parallel_for(int64_t n, void (*body)(void* context, int64_t i), void* context,
                  bool (*poll)(void* poll_context) = nullptr, void* poll_context = nullptr);

// For a body that takes long: has the caller's wish to stop been heard? On the calling thread this
// asks poll, if it is due. Outside of a parallel_for with a poll: false.
bool stop_wanted();

// parallel_for for a callable f(i).
template <class F, class = std::enable_if_t<std::is_invocable_v<F&, int64_t>>>
bool parallel_for(int64_t n, F&& f, bool (*poll)(void* poll_context) = nullptr,
                  void* poll_context = nullptr) {
  using Callable = std::remove_reference_t<F>;
  Callable* callable = std::addressof(f);
  // A pointer to the callable's address, so that const callables and functions pass through void*.
  return parallel_for(
      n, [](void* context, int64_t i) { (**static_cast<Callable**>(context))(i); }, &callable, poll,
      poll_context);
}

}  // namespace crossent
