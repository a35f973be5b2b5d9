#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "parallel.h"

namespace crossent {

#if defined(__x86_64__)
namespace isa_v2 {
extern const Kernels kernels;
}
namespace isa_v3 {
extern const Kernels kernels;
}
namespace isa_v4 {
extern const Kernels kernels;
}
namespace isa_v4bf16 {
extern const Kernels kernels;
}
#else
namespace isa_base {
extern const Kernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

// Best first, and only what the CPU and the operating system support.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const auto has_v3 = [] {
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
             __builtin_cpu_supports("popcnt");
    };
    const auto has_v4 = [&] {
#if defined(CROSSENT_EMULATE_V4)
      return has_v3();
#endif
      return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    };
    const auto has_bf16 = [] {
#if defined(CROSSENT_EMULATE_V4)
      return true;
#endif
      return __builtin_cpu_supports("avx512bf16") != 0;
    };
    if (has_v4() && has_bf16()) list.push_back({"x86-64-v4-bf16", &isa_v4bf16::kernels});
    if (has_v4()) list.push_back({"x86-64-v4", &isa_v4::kernels});
    if (has_v3()) list.push_back({"x86-64-v3", &isa_v3::kernels});
    list.push_back({"x86-64-v2", &isa_v2::kernels});
#else
    list.push_back({"base", &isa_base::kernels});
#endif
    return list;
  }();
  return found;
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
  const Isa* isa = chosen.load(std::memory_order_acquire);
  return isa ? *isa : isas().front();
}

// One thread's scratch. Small slots stay for the next call; a large one goes with its thread's
// task, so that one huge row does not keep its memory for ever.
struct Scratch {
  static constexpr int kSlots = 7;
  static constexpr int64_t kKeep = int64_t{16} << 20;
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
  } slots[kSlots];

  void* get(int slot, int64_t bytes) {
    Slot& s = slots[slot];
    if (bytes <= s.bytes) return s.data;
    std::free(s.data);
    const int64_t whole = (bytes + 4095) / 4096 * 4096;
    s.data = std::aligned_alloc(4096, static_cast<size_t>(whole));
    s.bytes = s.data ? whole : 0;
    return s.data;
  }
  void trim(int64_t keep) {
    for (Slot& s : slots)
      if (s.bytes > keep) {
        std::free(s.data);
        s = {};
      }
  }
  ~Scratch() { trim(0); }
};
thread_local Scratch thread_scratch;

// Work of about this many logits is worth handing to a thread.
constexpr int64_t kTaskLogits = 32768;

}  // namespace

void* scratch(int slot, int64_t bytes) { return thread_scratch.get(slot, bytes); }
void report_out_of_memory(const RowJob& job) {
  __atomic_store_n(job.no_memory, true, __ATOMIC_RELAXED);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

std::string current_isa() { return current().name; }

bool set_isa(const std::string& name) {
  for (const Isa& isa : isas())
    if (name == isa.name) {
      chosen.store(&isa, std::memory_order_release);
      return true;
    }
  return false;
}

Outcome run(RowJob job, bool (*poll)(void*), void* poll_context) {
  bool no_memory = false;
  job.no_memory = &no_memory;
  const Kernels& kernels = *current().kernels;
  const auto serve = lane_rows(job)    ? kernels.lanes
                     : short_rows(job) ? kernels.short_rows
                     : fast_rows(job)  ? kernels.rows
                                       : kernels.general;
  const int64_t rows = std::max<int64_t>(1, kTaskLogits / job.logits.classes);
  const int64_t tasks = (job.n_rows + rows - 1) / rows;
  const auto task = [&](int64_t k) {
    serve(job, k * rows, std::min(job.n_rows, (k + 1) * rows));
    thread_scratch.trim(Scratch::kKeep);
  };
  const bool done = parallel_for(tasks, task, poll, poll_context);
  if (no_memory) return Outcome::kOutOfMemory;
  return done ? Outcome::kDone : Outcome::kCancelled;
}

namespace {

// A compensated sum (Knuth's TwoSum) in eight lanes, so that one addition need not wait for the
// last.
class Total {
 public:
  void add(int lane, double x) {
    const double s = hi_[lane] + x, v = s - hi_[lane];
    lo_[lane] += (hi_[lane] - (s - v)) + (x - v);
    hi_[lane] = s;
  }
  double value() const {
    double hi = 0, lo = 0;
    for (int k = 0; k < kLanes; k++) {
      const double s = hi + hi_[k], v = s - hi;
      lo += (hi - (s - v)) + (hi_[k] - v) + lo_[k];
      hi = s;
    }
    return hi - hi == 0 ? hi + lo : hi;  // infinity and NaN leave no rounding error to add
  }
  static constexpr int kLanes = 8;

 private:
  double hi_[kLanes] = {}, lo_[kLanes] = {};
};

}  // namespace

double sum(const double* x, int64_t n) {
  Total total;
  int64_t i = 0;
  for (; i + Total::kLanes <= n; i += Total::kLanes)
    for (int k = 0; k < Total::kLanes; k++) total.add(k, x[i + k]);
  for (int k = 0; i < n; i++, k++) total.add(k, x[i]);
  return total.value();
}

TargetScan scan_targets(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                        const double* row_weight, const double* class_weight) {
  TargetScan scan;
  int64_t bad = 0, skipped = 0;
  const auto limit = static_cast<uint64_t>(n_classes);
  for (int64_t i = 0; i < n; i++) {
    skipped += target[i] == skip;
    bad += (static_cast<uint64_t>(target[i]) >= limit) & (target[i] != skip);
  }
  if (bad != 0) {
    for (scan.first_bad = 0;; scan.first_bad++) {
      const int64_t t = target[scan.first_bad];
      if (static_cast<uint64_t>(t) >= limit && t != skip) return scan;
    }
  }
  scan.kept = n - skipped;
  scan.weight_sum = static_cast<double>(scan.kept);
  if (!row_weight && !class_weight) return scan;
  Total total;
  scan.kept = 0;
  for (int64_t i = 0; i < n; i++) {
    const double s = row_weight ? row_weight[i] : 1.0;
    if (target[i] == skip || s == 0) continue;
    scan.kept++;
    total.add(static_cast<int>(i % Total::kLanes), class_weight ? s * class_weight[target[i]] : s);
  }
  scan.weight_sum = total.value();
  return scan;
}

}  // namespace crossent
