// Design.
// A. A job is a shared counter. The caller offers seats, starts on the work itself, and once the
//    counter is used up withdraws the seats nobody took: it waits for bodies that run, never for a
//    thread to wake up.
// B. Seats still offered and workers seated are the two halves of one atomic word (`state_`), so
//    taking a seat is one exchange. The job's fields are written only while both halves are zero.
// C. The pool lies in static storage and is never destroyed, its threads are detached: at exit they
//    sleep on a condition variable that stays valid. Joining them could hang (another thread may
//    still be inside a body), and destroying a condition variable with waiters is undefined.
// D. A forked child builds a new pool over the old bytes, which owned nothing but threads the child
//    does not have and locks in an unknown state. The handler allocates nothing and locks nothing.

#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cfenv>
#include <chrono>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <mutex>
#include <new>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace crossent {
namespace {

using Clock = std::chrono::steady_clock;

// Bridges the gap between two calls in a loop; too short for other libraries' threads to notice.
constexpr auto kSpin = std::chrono::microseconds(30);
constexpr double kUnlimited = std::numeric_limits<double>::infinity();
constexpr auto kPollPeriod = std::chrono::milliseconds(50);

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t sets[16];  // 16,384 CPUs; the kernel refuses a mask shorter than its own
  if (sched_getaffinity(0, sizeof(sets), sets) == 0) return CPU_COUNT_S(sizeof(sets), sets);
#endif
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

// The CPU quota set in one cgroup directory, in CPUs.
double quota_of(const std::string& directory) {
  double quota = 0, period = 0;
  const bool v2 = static_cast<bool>(std::ifstream(directory + "/cpu.max") >> quota >> period);
  const bool v1 = !v2 && std::ifstream(directory + "/cpu.cfs_quota_us") >> quota &&
                  std::ifstream(directory + "/cpu.cfs_period_us") >> period;
  return (v1 || v2) && quota > 0 ? quota / period : kUnlimited;  // v1 says -1 where there is none
}

// The tightest quota of this process's cgroups and their ancestors. A container often sees its own
// cgroup as the root of the mount while /proc still names the path outside: climbing ends there.
double cgroup_cpus() {
  double cpus = kUnlimited;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:/path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v1 = ("," + controllers + ",").find(",cpu,") != std::string::npos;
    if (!v1 && !controllers.empty()) continue;
    const std::string mount = v1 ? "/sys/fs/cgroup/cpu" : "/sys/fs/cgroup";
    std::string path = line.substr(second + 1);
    for (size_t end = path.size(); end != std::string::npos; end = path.rfind('/')) {
      path.resize(end);
      cpus = std::min(cpus, quota_of(mount + path));
    }
  }
  return cpus;
}

std::atomic<unsigned> forks{0};  // how many forks lie between the first process and this one

// The positive number in a variable, up to `separator`; 0 where it is unset or malformed.
int positive_number(const char* name, char separator) {
  const char* text = std::getenv(name);
  if (text == nullptr) return 0;
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  if (end == text || errno == ERANGE || value < 1 || value > INT_MAX) return 0;
  end += std::strspn(end, " \t\r\n");
  return *end == '\0' || *end == separator ? static_cast<int>(value) : 0;
}

int default_threads() {
  if (const int n = positive_number("CROSSENT_NUM_THREADS", '\0')) return n;
  if (forks > 0) return 1;
  if (const int n = positive_number("OMP_NUM_THREADS", ',')) return n;
  return available_cpus();
}

thread_local bool inside = false;  // on a pool thread, or below a parallel_for

// Marks the calling thread as inside, under the default floating-point environment.
struct Inside {
#if defined(__x86_64__)  // <cfenv> would take 0.2 us more, for the x87 unit that no body uses
  Inside() { inside = true, _mm_setcsr(0x1f80); }
  ~Inside() { inside = false, _mm_setcsr(saved); }
  unsigned saved = _mm_getcsr();
#else
  Inside() { inside = true, std::fegetenv(&saved), std::fesetenv(FE_DFL_ENV); }
  ~Inside() { inside = false, std::fesetenv(&saved); }
  std::fenv_t saved;
#endif
};

// The caller's wish to stop, asked for when a poll is due and remembered.
class Poller {
 public:
  Poller(bool (*poll)(void*), void* context) : poll_(poll), context_(context) {
    if (poll_ != nullptr) due_ = Clock::now() + kPollPeriod;
  }
  bool cancelled() {
    if (poll_ == nullptr || Clock::now() < due_) return cancelled_;
    cancelled_ = !poll_(context_);
    if (cancelled_) poll_ = nullptr;
    due_ = Clock::now() + kPollPeriod;
    return cancelled_;
  }
  bool active() const { return poll_ != nullptr; }

 private:
  bool (*poll_)(void*);
  void* context_;
  Clock::time_point due_;
  bool cancelled_ = false;
};

thread_local Poller* own_poller = nullptr;  // of the calling thread's innermost parallel_for

struct PollerScope {
  explicit PollerScope(Poller* poller) : before(own_poller) { own_poller = poller; }
  ~PollerScope() { own_poller = before; }
  Poller* before;
};

struct Job {
  int64_t n;
  void (*body)(void*, int64_t);
  void* context;
};

bool run_serially(const Job& job, Poller& poller) {
  for (int64_t i = 0; i < job.n; ++i) {
    job.body(job.context, i);
    if (poller.cancelled()) return false;
  }
  return true;
}

template <class Done>
bool spin_until(Done done) {
  const auto deadline = Clock::now() + kSpin;
  for (int k = 1; !done(); ++k) {
    if (k % 16 == 0 && Clock::now() > deadline) return false;
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  return true;
}

class Pool {
 public:
  bool acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }
  bool run(const Job& job, Poller& poller);  // between acquire and release
  void serve();                              // a worker's life
  int threads();
  void set_threads(int n, bool unless_decided);
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

 private:
  void open();
  bool spawn();
  bool wait_for_workers(bool polled);
  bool take_seat();
  bool wait_for_seat();

  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void cancel() {
    cancelled_.store(true, std::memory_order_relaxed);
    next_.store(job_.n, std::memory_order_relaxed);
  }

  static constexpr uint64_t kSeat = uint64_t{1} << 32;

  std::atomic<bool> busy_{false};
  std::atomic<bool> spin_{false};
  std::atomic<bool> cancelled_{false};          // the job there is or was
  alignas(64) std::atomic<uint64_t> state_{0};  // seats offered * kSeat + workers seated
  Job job_{};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::mutex mutex_;  // guards what follows (threads_ may be read without)
  std::condition_variable wake_;  // workers, for a seat or for the pool to shrink
  std::condition_variable done_;  // the caller, for the last worker to leave its seat
  std::atomic<int> threads_{0};   // at most, with the caller's; 0: not decided yet
  int64_t workers_ = 0;           // alive
  int64_t sleeping_ = 0;
};

int Pool::threads() {
  if (threads_ == 0) set_threads(default_threads(), true);
  return threads_;
}

void Pool::set_threads(int n, bool unless_decided) {
  const bool spare_cpus = n <= available_cpus();
  std::lock_guard<std::mutex> lock(mutex_);
  if (unless_decided && threads_ > 0) return;
  threads_ = n;
  spin_ = spare_cpus;
  if (workers_ >= n) wake_.notify_all();
}

// Returns whether all of the job ran.
bool Pool::run(const Job& job, Poller& poller) {
  const auto forked = [generation = forks.load()] { return forks != generation; };
  job_ = job;
  cancelled_.store(false, std::memory_order_relaxed);
  next_.store(0, std::memory_order_relaxed);
  open();
  for (int64_t i; (i = take()) < job.n;) {
    job.body(job.context, i);
    if (poller.cancelled()) cancel();
    if (forked()) return false;
  }
  state_.fetch_and(kSeat - 1, std::memory_order_acq_rel);
  while (!wait_for_workers(poller.active())) {
    if (poller.cancelled()) cancel();
    if (forked()) return false;
  }
  release();
  return !poller.cancelled();
}

// Publishes the job, with as many seats as workers can be had.
void Pool::open() {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t useful = std::min<int64_t>(threads_ - 1, job_.n - 1);
  while (workers_ < useful && spawn()) ++workers_;
  const int64_t seats = std::min(useful, workers_);
  state_.store(static_cast<uint64_t>(seats) * kSeat, std::memory_order_release);
  // A worker that is awake looks for a seat, under this lock, before it goes to sleep.
  const int64_t asleep = seats - (workers_ - sleeping_);
  lock.unlock();
  for (int64_t k = 0; k < asleep; ++k) wake_.notify_one();
}

// Returns whether the system gave a thread; without one the job runs on those there are.
bool Pool::spawn() {
  // Signals go to the program's own threads, so that Ctrl-C interrupts Python's main thread. Faults
  // stay deliverable: a blocked one kills the process without a word from its fault handler.
  sigset_t blocked, previous;
  sigfillset(&blocked);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, fault);
  pthread_sigmask(SIG_SETMASK, &blocked, &previous);
  const auto main = [](void* pool) -> void* {
    static_cast<Pool*>(pool)->serve();
    return nullptr;
  };
  pthread_t thread;
  const bool started = pthread_create(&thread, nullptr, main, this) == 0;
  if (started) pthread_detach(thread);
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  return started;
}

// Returns true when no body runs any more, false when a poll is due before that.
bool Pool::wait_for_workers(bool polled) {
  const auto idle = [this] { return state_.load(std::memory_order_acquire) == 0; };
  if (idle() || (spin_ && spin_until(idle))) return true;
  std::unique_lock<std::mutex> lock(mutex_);
  if (!polled) return done_.wait(lock, idle), true;
  return done_.wait_for(lock, kPollPeriod, idle);
}

void Pool::serve() {
  inside = true;  // in the floating-point environment of Inside: a thread inherits its creator's
  while (wait_for_seat()) {
    const Job job = job_;
    for (int64_t i; (i = take()) < job.n;) job.body(job.context, i);
    if (state_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      // A caller about to sleep holds the lock from its last look at the state on.
      std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_one();
    }
  }
}

bool Pool::take_seat() {
  uint64_t state = state_.load(std::memory_order_relaxed);
  while (state >= kSeat &&
         !state_.compare_exchange_weak(state, state - kSeat + 1, std::memory_order_acquire,
                                       std::memory_order_relaxed)) {
  }
  return state >= kSeat;
}

// Returns false when the pool has shrunk and this worker is to end.
bool Pool::wait_for_seat() {
  const auto seated = [this] { return take_seat(); };
  if (spin_ && spin_until(seated)) return true;
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleeping_;
  bool taken = false;
  wake_.wait(lock, [&] { return (taken = take_seat()) || workers_ >= threads_; });
  --sleeping_;
  if (!taken) --workers_;
  return taken;
}

alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* const pool = new (storage) Pool;

void reset_in_child() {
  new (storage) Pool;
  ++forks;
}

// At load, so that a fork before first use counts too.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, reset_in_child);

}  // namespace

int available_cpus() {
  return std::max<int>(1, std::min<double>(affinity_cpus(), std::ceil(cgroup_cpus())));
}

int num_threads() { return pool->threads(); }

void set_num_threads(int n) { pool->set_threads(std::max(n, 1), false); }

bool stop_wanted() { return own_poller ? own_poller->cancelled() : inside && pool->cancelled(); }

bool parallel_for(int64_t n, void (*body)(void*, int64_t), void* context, bool (*poll)(void*),
                  void* poll_context) {
  const Job job{n, body, context};
  Poller poller(poll, poll_context);
  const PollerScope polled(&poller);
  if (inside) return run_serially(job, poller);
  const Inside scope;
  const bool shared = n > 1 && num_threads() > 1 && pool->acquire();
  return shared ? pool->run(job, poller) : run_serially(job, poller);
}

}  // namespace crossent
