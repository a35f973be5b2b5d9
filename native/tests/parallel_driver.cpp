// Exercises the thread pool without Python. From the repository root:
//
//   c++ -std=c++17 -O2 -g -Wall -Wextra -pthread
//       native/parallel.cpp native/tests/parallel_driver.cpp -o build/parallel_driver
//
//   build/parallel_driver              every check; on the first failure a line and exit status 1
//   build/parallel_driver COMMAND      the same, where COMMAND starts this program: an emulator
//   build/parallel_driver --latency    the median times of the smallest calls on 2 threads
//   build/parallel_driver --threads    num_threads(), for the checks of the environment
//
// and once more each with -fsanitize=thread and -fsanitize=address,undefined. ThreadSanitizer
// cannot follow a process of several threads through fork: the checks that fork are left out there.

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iterator>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../parallel.h"

namespace {

using crossent::parallel_for;
using crossent::set_num_threads;
using namespace std::chrono_literals;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                       \
    }                                                                      \
  } while (false)

// Waits for what another thread will do; fails rather than hang.
template <class Condition>
void await(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + 30s;
  while (!condition()) {
    CHECK(std::chrono::steady_clock::now() < deadline);
    std::this_thread::yield();
  }
}

// One parallel_for whose every i must run exactly once. The counters are plain ints: two threads
// on the same i, or a return before the last body ended, is a data race that TSan sees.
void count_once(int64_t n) {
  std::vector<int> counts(n);
  CHECK(parallel_for(n, [&](int64_t i) { ++counts[i]; }));
  CHECK(std::all_of(counts.begin(), counts.end(), [](int count) { return count == 1; }));
}

// A parallel_for in which two bodies are inside at the same time, so that a worker surely has one.
template <class F>
bool run_two_at_once(F f, bool (*poll)(void*) = nullptr, void* poll_context = nullptr) {
  std::atomic<int> entered{0};
  return parallel_for(
      2,
      [&](int64_t i) {
        ++entered;
        await([&] { return entered == 2; });
        f(i);
      },
      poll, poll_context);
}

void check_every_index_once() {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (int64_t n : {-1, 0}) CHECK(parallel_for(n, [](int64_t) { CHECK(false); }));
    for (int64_t n : {1, 2, 3, 7, 100}) {
      for (int round = 0; round < 500; ++round) count_once(n);
    }
    for (int round = 0; round < 5; ++round) count_once(100'000);
  }
}

void check_callables() {
  set_num_threads(2);
  static std::atomic<int> calls{0};
  const auto constant = [](int64_t) { ++calls; };
  void (*function)(int64_t) = constant;
  CHECK(parallel_for(10, constant) && parallel_for(10, *function) && calls == 20);
  CHECK(parallel_for(
      10, [](void* context, int64_t) { ++*static_cast<std::atomic<int>*>(context); }, &calls));
  CHECK(calls == 30);
}

// On the thread it was called from, also where the outer call left the pool free.
void check_nested() {
  set_num_threads(4);
  for (int64_t outer : {1, 16}) {
    for (int round = 0; round < 200; ++round) {
      std::vector<std::vector<int>> counts(outer, std::vector<int>(16));
      CHECK(parallel_for(outer, [&](int64_t i) {
        const auto self = std::this_thread::get_id();
        CHECK(parallel_for(16, [&](int64_t j) {
          CHECK(std::this_thread::get_id() == self);
          ++counts[i][j];
          std::this_thread::yield();
        }));
      }));
      for (const auto& row : counts) CHECK(row == std::vector<int>(16, 1));
    }
  }
}

void check_many_callers() {
  set_num_threads(3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([caller] {
      for (int round = 0; round < 1000; ++round) count_once(1 + (caller * 31 + round) % 200);
    });
  }
  callers.emplace_back([] {
    for (int round = 0; round < 200; ++round) {
      set_num_threads(1 + round % 6);
      std::this_thread::yield();
    }
  });
  for (auto& caller : callers) caller.join();
}

#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
int tasks() {
  const std::filesystem::directory_iterator threads("/proc/self/task");
  return static_cast<int>(std::distance(begin(threads), end(threads)));
}
const int other_threads = tasks();  // ThreadSanitizer starts one of its own later
#endif

// As many threads as asked for take part, never more, and those too many end.
void check_thread_limit() {
  for (int threads : {6, 2, 4, 1, 3}) {
    set_num_threads(threads);
    CHECK(crossent::num_threads() == threads);
    std::mutex mutex;
    std::set<std::thread::id> seen;
    std::atomic<int> entered{0};
    parallel_for(threads, [&](int64_t) {  // ends only if as many threads as asked for are there
      if (threads > 1) {
        ++entered;
        await([&] { return entered == threads; });
      }
      std::lock_guard<std::mutex> lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
    CHECK(static_cast<int>(seen.size()) == threads);
    seen.clear();
    parallel_for(50, [&](int64_t) {
      std::this_thread::sleep_for(200us);
      std::lock_guard<std::mutex> lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
    CHECK(static_cast<int>(seen.size()) <= threads);
#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
    await([&] { return tasks() == other_threads + threads - 1; });
#endif
  }
}

struct PollLog {
  std::thread::id caller = std::this_thread::get_id();
  int calls = 0;
  int stop_at = 0;  // 0: never
  static bool poll(void* context) {
    auto* log = static_cast<PollLog*>(context);
    CHECK(std::this_thread::get_id() == log->caller);
    return ++log->calls != log->stop_at;
  }
};

void check_poll() {
  for (int threads : {1, 2, 4}) {
    set_num_threads(threads);
    const auto pause = [](int64_t) { std::this_thread::sleep_for(5ms); };
    PollLog patient;
    CHECK(parallel_for(30 * threads, pause, PollLog::poll, &patient) && patient.calls > 0);

    PollLog stopping;
    stopping.stop_at = 2;
    std::atomic<int> started{0};
    const auto count = [&](int64_t i) { ++started, pause(i); };
    CHECK(!parallel_for(2000, count, PollLog::poll, &stopping));
    CHECK(started < 2000 && stopping.calls == 2);
    const int at_return = started;
    std::this_thread::sleep_for(20ms);
    CHECK(started == at_return);
    count_once(1000);
  }
}

// The caller's body is over at once; it polls while the worker's runs.
void check_poll_while_waiting() {
  set_num_threads(2);
  for (int stop_at : {0, 1}) {
    PollLog log;
    log.stop_at = stop_at;
    const auto slow_elsewhere = [&](int64_t) {
      if (std::this_thread::get_id() != log.caller) std::this_thread::sleep_for(250ms);
    };
    CHECK(run_two_at_once(slow_elsewhere, PollLog::poll, &log) == (stop_at == 0));
    CHECK(stop_at == 0 ? log.calls >= 2 : log.calls == 1);
  }
}

// A body that would never end but for the wish to stop, on the calling thread and on a worker.
void check_stop_wanted() {
  CHECK(!crossent::stop_wanted());
  const auto endless = [](int64_t) { await([] { return crossent::stop_wanted(); }); };
  for (int threads : {1, 2}) {
    set_num_threads(threads);
    PollLog log;
    log.stop_at = 2;
    CHECK(!(threads == 1 ? parallel_for(1, endless, PollLog::poll, &log)
                         : run_two_at_once(endless, PollLog::poll, &log)));
    CHECK(log.calls == 2);
    CHECK(!crossent::stop_wanted());
    CHECK(parallel_for(100, [](int64_t) { CHECK(!crossent::stop_wanted()); }));
  }
}

// A signal handler of Python's, run by the poll, may itself call the library.
void check_call_from_poll() {
  set_num_threads(2);
  const auto poll = [](void* calls) {
    count_once(100);
    return ++*static_cast<int*>(calls) < 3;
  };
  int calls = 0;
  CHECK(!parallel_for(5000, [](int64_t) { std::this_thread::sleep_for(1ms); }, poll, &calls));
  CHECK(calls == 3);
}

bool rounds_up() {
  const volatile double one = 1, tiny = 1e-30;  // not for the compiler to add
  return one + tiny > one;
}

// Every thread computes under the same floating-point environment; the caller gets its own back.
void check_rounding() {
  set_num_threads(2);
  std::fesetround(FE_UPWARD);
  CHECK(rounds_up());
  run_two_at_once([](int64_t) { CHECK(!rounds_up()); });
  CHECK(rounds_up());
  std::fesetround(FE_TONEAREST);
}

void check_signals() {
  set_num_threads(2);
  const auto caller = std::this_thread::get_id();
  run_two_at_once([&](int64_t) {
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    const bool worker = std::this_thread::get_id() != caller;
    CHECK(sigismember(&blocked, SIGINT) == worker && sigismember(&blocked, SIGTERM) == worker);
    CHECK(sigismember(&blocked, SIGSEGV) == 0);
  });
}

#if !defined(__SANITIZE_THREAD__)

[[noreturn]] void end_child() {
#if defined(__SANITIZE_ADDRESS__)
  _exit(0);  // its leak check would look for the parent's threads
#else
  std::exit(0);  // as a program ends that does not know of the pool
#endif
}

void in_child(const std::function<void()>& work) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(60);
    work();
    end_child();
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

void use_pool() {
  count_once(1000);
  set_num_threads(3);
  CHECK(crossent::num_threads() == 3);
  for (int round = 0; round < 100; ++round) count_once(100);
  run_two_at_once([](int64_t) {});
}

void check_fork() {
  set_num_threads(4);
  count_once(1000);
  in_child([] {
    CHECK(crossent::num_threads() == 1);
    use_pool();
    in_child([] {
      CHECK(crossent::num_threads() == 1);
      use_pool();
    });
  });
  in_child([] {
    setenv("OMP_NUM_THREADS", "6", 1);
    CHECK(crossent::num_threads() == 1);
  });
  in_child([] {
    setenv("CROSSENT_NUM_THREADS", "5", 1);
    CHECK(crossent::num_threads() == 5);
    run_two_at_once([](int64_t) {});
  });
  CHECK(crossent::num_threads() == 4);
  count_once(1000);
}

void check_fork_while_busy() {
  set_num_threads(3);
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([&] {
      std::array<int, 50> counts{};  // no allocation: not every sanitizer's allocator can be forked
      while (!stop) parallel_for(50, [&](int64_t i) { ++counts[i]; });
    });
  }
  for (int round = 0; round < 100; ++round) in_child(use_pool);
  stop = true;
  for (auto& caller : callers) caller.join();
}

// A signal handler of Python's may fork: neither side may hang. In the child the other threads'
// part of the work is gone.
void check_fork_in_poll(bool while_waiting) {
  set_num_threads(while_waiting ? 2 : 3);
  pid_t child = -1;
  const auto poll = [](void* context) {
    auto* forked = static_cast<pid_t*>(context);
    if (*forked == -1) *forked = fork();
    return true;
  };
  const auto caller = std::this_thread::get_id();
  std::atomic<int> calls{0};
  const auto slow = [&](int64_t) { ++calls, std::this_thread::sleep_for(1ms); };
  const auto slow_elsewhere = [&](int64_t) {
    if (std::this_thread::get_id() != caller) std::this_thread::sleep_for(250ms);
  };
  const bool all = while_waiting ? run_two_at_once(slow_elsewhere, poll, &child)
                                 : parallel_for(300, slow, poll, &child);
  if (child == 0) {
    CHECK(!all);
    use_pool();
    end_child();
  }
  int status = 0;
  CHECK(all && calls == (while_waiting ? 0 : 300));
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

#endif

std::string threads_with(const std::string& environment, const std::string& program) {
  FILE* out = popen(("env -u CROSSENT_NUM_THREADS -u OMP_NUM_THREADS " + environment + " " +
                     program + " --threads")
                        .c_str(),
                    "r");
  char line[32] = {};
  CHECK(out != nullptr && std::fgets(line, sizeof(line), out) != nullptr && pclose(out) == 0);
  return std::string(line, std::strcspn(line, "\n"));
}

void check_environment(const std::string& program) {
  const std::string cpus = threads_with("", program);
  CHECK(cpus == std::to_string(crossent::available_cpus()));
  CHECK(threads_with("CROSSENT_NUM_THREADS=5 OMP_NUM_THREADS=7", program) == "5");
  CHECK(threads_with("CROSSENT_NUM_THREADS='5 '", program) == "5");
  CHECK(threads_with("OMP_NUM_THREADS=7", program) == "7");
  CHECK(threads_with("OMP_NUM_THREADS='7, 3'", program) == "7");
  for (const char* malformed : {"''", "0", "-2", "x", "5x", "5,3", "2.5", "99999999999999999999"}) {
    const std::string variable = std::string("CROSSENT_NUM_THREADS=") + malformed;
    CHECK(threads_with(variable + " OMP_NUM_THREADS=7", program) == "7");
    CHECK(threads_with(variable + " OMP_NUM_THREADS=x", program) == cpus);
  }
}

template <class F>
double median_us(int rounds, F call) {
  std::vector<double> times(rounds);
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::micro> elapsed =
        std::chrono::steady_clock::now() - start;
    time = elapsed.count();
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[rounds / 2];
}

void print_latency() {
  const auto nothing = [](int64_t) {};
  set_num_threads(2);
  std::printf("empty parallel_for(1)            %6.2f us\n",
              median_us(100'000, [&] { parallel_for(1, nothing); }));
  std::printf("empty parallel_for(2)            %6.2f us\n",
              median_us(100'000, [&] { parallel_for(2, nothing); }));
  std::printf("  both threads taking part       %6.2f us\n",
              median_us(20'000, [&] { run_two_at_once(nothing); }));
  const auto asleep = [&](auto call) {
    std::vector<double> times(501);
    for (double& time : times) std::this_thread::sleep_for(1ms), time = median_us(1, call);
    std::nth_element(times.begin(), times.begin() + 250, times.end());
    return times[250];
  };
  std::printf("  the worker asleep              %6.2f us\n",
              asleep([&] { parallel_for(2, nothing); }));
  std::printf("  the worker asleep, taking part %6.2f us\n",
              asleep([&] { run_two_at_once(nothing); }));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--latency") return print_latency(), 0;
  if (mode == "--threads") return std::printf("%d\n", crossent::num_threads()), 0;
  alarm(600);  // a hang is a failure
  unsetenv("CROSSENT_NUM_THREADS");
  check_environment(argc > 1 ? argv[1] : argv[0]);
  check_every_index_once();
  check_callables();
  check_nested();
  check_many_callers();
  check_thread_limit();
  check_poll();
  check_poll_while_waiting();
  check_stop_wanted();
  check_call_from_poll();
  check_rounding();
  check_signals();
#if !defined(__SANITIZE_THREAD__)
  check_fork();
  check_fork_while_busy();
  check_fork_in_poll(false);
  check_fork_in_poll(true);
#endif
  set_num_threads(4);
  count_once(100);  // the process ends while workers spin or sleep
  std::puts("ok");
  return 0;
}
