#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "parallel.h"
#include "scratch.h"
#include "total.h"

namespace crossent {

#if defined(__x86_64__)
namespace isa_v2 {
extern const Kernels kernels;
extern const GemmTable gemm;
extern const AlongTable along;
}  // namespace isa_v2
namespace isa_v3 {
extern const Kernels kernels;
extern const GemmTable gemm;
extern const AlongTable along;
}  // namespace isa_v3
namespace isa_v4 {
extern const Kernels kernels;
extern const GemmTable gemm;
extern const AlongTable along;
}  // namespace isa_v4
namespace isa_v4bf16 {
extern const Kernels kernels;
extern const GemmTable gemm;
extern const AlongTable along;
}  // namespace isa_v4bf16
#else
namespace isa_base {
extern const Kernels kernels;
extern const GemmTable gemm;
extern const AlongTable along;
}  // namespace isa_base
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const GemmTable* gemm;
  const AlongTable* along;
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
             __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("lzcnt");
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
    if (has_v4() && has_bf16())
      list.push_back(
          {"x86-64-v4-bf16", &isa_v4bf16::kernels, &isa_v4bf16::gemm, &isa_v4bf16::along});
    if (has_v4()) list.push_back({"x86-64-v4", &isa_v4::kernels, &isa_v4::gemm, &isa_v4::along});
    if (has_v3()) list.push_back({"x86-64-v3", &isa_v3::kernels, &isa_v3::gemm, &isa_v3::along});
    list.push_back({"x86-64-v2", &isa_v2::kernels, &isa_v2::gemm, &isa_v2::along});
#else
    list.push_back({"base", &isa_base::kernels, &isa_base::gemm, &isa_base::along});
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

// Work of about this many logits is worth handing to a thread.
constexpr int64_t kTaskLogits = 32768;

}  // namespace

const GemmTable& gemm_kernels() { return *current().gemm; }
const AlongTable& along_kernels() { return *current().along; }
RowKernel row_kernel(const RowJob& job) {
  const Kernels& kernels = *current().kernels;
  return lane_rows(job, kernels.lane_classes) ? kernels.lanes
         : short_rows(job)                    ? kernels.short_rows
         : lane_hvp(job)                      ? kernels.hvp
         : fast_rows(job)                     ? kernels.rows
                                              : kernels.general;
}
void report_out_of_memory(const RowJob& job) {
  __atomic_store_n(job.no_memory, true, __ATOMIC_RELAXED);
}
bool given_up() { return stop_wanted(); }
void report_bad_target(const RowJob& job) {
  __atomic_store_n(job.bad_target, true, __ATOMIC_RELAXED);
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

namespace {

// One call's rows on the pool, in tasks whose size depends on the number of classes alone.
class Run {
 public:
  Run(const RowJob& job, double* total, bool (*poll)(void*), void* poll_context)
      : job_(job),
        total_(total),
        poll_(poll),
        poll_context_(poll_context),
        kernels_(*current().kernels) {
    job_.no_memory = &no_memory_;
    job_.bad_target = &bad_target_;
    rows_ = std::max<int64_t>(1, kTaskLogits / job.logits.classes);
    if (rows_ > 16) rows_ = rows_ / 16 * 16;  // whole tiles of any instruction set
    if (total_) sums_.resize(static_cast<size_t>((job.n_rows + rows_ - 1) / rows_));
  }

  Outcome operator()() {
    const OwnScratch scratch;
    const bool done = in_parts(job_, num_threads()) ? parts() : tasks();
    if (no_memory_) return Outcome::kOutOfMemory;
    if (!done) return Outcome::kCancelled;
    if (bad_target_) return Outcome::kBadTarget;
    if (total_) *total_ = kernels_.total(sums_.data(), static_cast<int64_t>(sums_.size()));
    return Outcome::kDone;
  }

 private:
  bool tasks() {
    const RowKernel serve = row_kernel(job_);
    const int64_t n = (job_.n_rows + rows_ - 1) / rows_;
    return parallel_for(
        n,
        [&](int64_t k) {
          task(k, serve);
          trim_scratch();
        },
        poll_, poll_context_);
  }

  void task(int64_t k, RowKernel serve) {
    const int64_t begin = k * rows_, end = std::min(job_.n_rows, begin + rows_);
    if (!total_) return serve(job_, begin, end);
    RowJob mine = job_;
    if (!mine.loss) {
      const int64_t bytes = (end - begin) * int64_t{sizeof(double)};
      mine.loss = static_cast<double*>(scratch(kLossSlot, bytes));
      mine.first_loss = begin;
      if (!mine.loss) return report_out_of_memory(job_);
    }
    serve(mine, begin, end);
    add_up(k, mine, begin, end);
  }

  void add_up(int64_t k, const RowJob& job, int64_t begin, int64_t end) {
    sums_[static_cast<size_t>(k)] = kernels_.total(job.loss_of(begin), end - begin);
  }

  // One row after the other, each on all threads. (Rows so long are a task each.)
  bool parts() {
    const int64_t compute = job_.logits.dtype == Dtype::kFloat64 ? 8 : 4;
    const int64_t n = (job_.logits.classes * compute + kPartBytes - 1) / kPartBytes;
    const int64_t bytes = kernels_.part_bytes(job_);
    void* at = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
    if (!at) report_out_of_memory(job_);
    bool going = at != nullptr;
    for (int64_t i = 0; going && i < job_.n_rows; i++) {
      RowJob mine = job_;
      double loss;
      if (total_ && !mine.loss) mine.loss = &loss, mine.first_loss = i;
      going = row_in_parts(mine, i, n, at) && !no_memory_;
      if (going && total_) add_up(i, mine, i, i + 1);
      trim_scratch();
      // parallel_for asks after 50 ms, and may have been done by then each time.
      if (going && poll_) going = poll_(poll_context_);
    }
    std::free(at);
    return going;
  }

  bool row_in_parts(const RowJob& job, int64_t i, int64_t n, void* at) {
    if (job.dropped(i)) {
      kernels_.rows(job, i, i + 1);
      return true;
    }
    if (kernels_.part_start(job, i, at)) {
      const auto read = [&](int64_t k) { kernels_.part_read(job, i, k, at); };
      if (!parallel_for(n, read, poll_, poll_context_)) return false;
      if (kernels_.part_numbers(job, i, at)) {
        if (!job.out.data) return true;
        const auto write = [&](int64_t k) { kernels_.part_write(job, i, k, at); };
        return parallel_for(n, write, poll_, poll_context_);
      }
    }
    if (!no_memory_) kernels_.general(job, i, i + 1);
    return true;
  }

  static constexpr int kLossSlot = 7;

  RowJob job_;
  double* const total_;
  bool (*const poll_)(void*);
  void* const poll_context_;
  const Kernels& kernels_;
  int64_t rows_ = 1;  // a task's
  std::vector<double> sums_;
  bool no_memory_ = false, bad_target_ = false;
};

}  // namespace

Outcome run(RowJob job, double* total, bool (*poll)(void*), void* poll_context) {
  return Run(job, total, poll, poll_context)();
}

TargetScan scan_targets(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                        const double* row_weight, const double* class_weight) {
  TargetScan scan;
  int64_t bad = 0, skipped = 0;
  current().kernels->count_targets(target, n, n_classes, skip, &bad, &skipped);
  if (bad != 0) {
    for (scan.first_bad = 0; scan.first_bad < n; scan.first_bad++) {
      const int64_t t = target[scan.first_bad];
      if ((t < 0 || t >= n_classes) && t != skip) return scan;
    }
    scan.first_bad = -1;  // another thread has put it right; the kernels look again
  }
  scan.kept = n - skipped;
  scan.weight_sum = static_cast<double>(scan.kept);
  if (!row_weight && !class_weight) return scan;
  Total total;
  scan.kept = 0;
  for (int64_t i = 0; i < n; i++) {
    const double s = row_weight ? row_weight[i] : 1.0;
    const int64_t t = __atomic_load_n(target + i, __ATOMIC_RELAXED);
    if (t == skip || s == 0) continue;
    if (t < 0 || t >= n_classes) {  // another thread has just written it
      scan.first_bad = i;
      return scan;
    }
    scan.kept++;
    total.add(static_cast<int>(i % Total::kLanes), class_weight ? s * class_weight[t] : s);
  }
  scan.weight_sum = total.value();
  return scan;
}

}  // namespace crossent
