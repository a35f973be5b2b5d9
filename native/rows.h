// The contract between the host (dispatch.cpp) and the row kernels: pointers, sizes and numbers.
// Nothing here knows an option's name or Python; src/crossent/rows.py decides what the numbers are.
//
// Notation: N rows, V classes. Row i = o * inner + k runs over the axes beside the class axis.
#pragma once

#include <cstdint>

namespace crossent {

enum class Dtype : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// An array (outer, V, inner); strides in bytes, possibly negative or zero.
struct View {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t outer = 0, classes = 0, inner = 0;
  int64_t outer_stride = 0, class_stride = 0, inner_stride = 0;
  bool padded = false;  // behind each row a vector's width of memory that may be read and written

  char* row(int64_t i) const {
    // A division takes as long as a short row.
    if (outer == 1) return data + i * inner_stride;
    if (inner == 1) return data + i * outer_stride;
    const int64_t o = i / inner;
    return data + o * outer_stride + (i - o * inner) * inner_stride;
  }
  bool contiguous_rows() const { return class_stride == size_of(dtype) || classes == 1; }
};

enum class Task : int { kLoss, kSoftmax, kLogSoftmax, kStats, kHvp };
enum class Target : int { kNone, kIndex, kDistribution, kSparse };

// One call: q_ij = w_j (on a_ij + off), r_i = s_i / divisor, and what to do with them.
struct RowJob {
  Task task = Task::kLoss;
  int64_t n_rows = 0;
  View logits;
  View out;     // gradient, softmax, log-softmax or Hessian-vector product; data null: not wanted
  View vector;  // kHvp

  Target kind = Target::kNone;
  const int64_t* target = nullptr;      // kIndex: (N,); kSparse: ids (N, K), -1 where padding
  const double* target_prob = nullptr;  // kSparse: (N, K)
  int64_t n_ids = 0;                    // K
  View distribution;                    // kDistribution
  bool round_target = false;            // to float32 first: the compute dtype of the logits

  int64_t skip = 0;                      // kIndex: rows with this target are dropped
  const double* class_weight = nullptr;  // (V,) or null: all 1
  double on = 1, off = 0;
  const double* row_weight = nullptr;  // (N,) or null: all 1; 0 drops the row
  double divisor = 1;
  double z_loss = 0, logit_scale = 1, softcap = 0;

  const double* upstream = nullptr;  // (N,) or null: all upstream_all
  double upstream_all = 1;

  double* loss = nullptr;  // of row first_loss on, or null
  int64_t first_loss = 0;
  double* logsumexp = nullptr;
  double* target_logprob = nullptr;
  double* entropy = nullptr;
  int64_t* argmax = nullptr;
  int64_t* target_rank = nullptr;

  bool* no_memory = nullptr;   // set by report_out_of_memory
  bool* bad_target = nullptr;  // set by report_bad_target

  double* loss_of(int64_t i) const { return loss + (i - first_loss); }
  // Is row i kept? Then *t is its class (kIndex; else 0). A target outside the classes that is not
  // `skip` is reported, and its row dropped. The target is the caller's own memory, which another
  // thread may be writing to: who needs the class takes it from here, where it has been checked.
  bool kept(int64_t i, int64_t* t) const;
  bool dropped(int64_t i) const {
    int64_t t;
    return !kept(i, &t);
  }
  double row_scale(int64_t i) const { return (row_weight ? row_weight[i] : 1.0) / divisor; }
  double row_upstream(int64_t i) const { return upstream ? upstream[i] : upstream_all; }
};

// One instruction set's kernels. All serve rows [begin, end) and are safe to call from many
// threads.
struct Kernels {
  // Index targets and none, float compute, up to lane_classes: one row a lane, in any layout
  // (lanes.cpp).
  int64_t lane_classes;
  void (*lanes)(const RowJob&, int64_t begin, int64_t end);
  // The same for more classes, as long as a row is one block (short.cpp).
  void (*short_rows)(const RowJob&, int64_t begin, int64_t end);
  // Hessian-vector products of few classes, index targets: one row a lane (hvp.cpp).
  void (*hvp)(const RowJob&, int64_t begin, int64_t end);
  // Index targets and none, in lanes of the compute dtype: see rows.cpp for what it takes.
  void (*rows)(const RowJob&, int64_t begin, int64_t end);
  // Everything, in lanes of float64.
  void (*general)(const RowJob&, int64_t begin, int64_t end);

  // How many of n index targets are outside the classes (but not `skip`), and how many are `skip`.
  void (*count_targets)(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                        int64_t* outside, int64_t* skipped);
  // The sum of n losses: Total of total.h, the same bits from every instruction set.
  double (*total)(const double* losses, int64_t n);

  // What `rows` does, for one row in parts of kPartBytes in the compute type. `at` is memory of
  // part_bytes(job) bytes, the row's own. First start, then every part is read, by any thread, then
  // the numbers, then every part is written if there is an output. Where start or numbers say
  // false, nothing has been written and general serves the row.
  int64_t (*part_bytes)(const RowJob&);
  bool (*part_start)(const RowJob&, int64_t i, void* at);
  void (*part_read)(const RowJob&, int64_t i, int64_t part, void* at);
  bool (*part_numbers)(const RowJob&, int64_t i, void* at);
  void (*part_write)(const RowJob&, int64_t i, int64_t part, void* at);
};
constexpr int64_t kPartBytes = int64_t{1} << 17;

// Thread-local memory, aligned to 64 bytes, contents unspecified; null when there is none left.
// The same slot's earlier memory is gone after a larger request.
void* scratch(int slot, int64_t bytes);
// A kernel that got no memory says so; the host raises when all threads are done.
void report_out_of_memory(const RowJob& job);
// Has the caller lost interest? A kernel that is at one row for long may then leave it unfinished.
bool given_up();
// Of an index target outside the classes.
void report_bad_target(const RowJob& job);

inline bool RowJob::kept(int64_t i, int64_t* t) const {
  *t = 0;
  if (kind == Target::kIndex) {
    const int64_t given = __atomic_load_n(target + i, __ATOMIC_RELAXED);
    if (given == skip) return false;
    if (static_cast<uint64_t>(given) >= static_cast<uint64_t>(logits.classes)) {
      report_bad_target(*this);
      return false;
    }
    *t = given;
  }
  return !row_weight || row_weight[i] != 0;
}

// What a dropped row comes to, but for `out`.
inline void drop(const RowJob& job, int64_t i) {
  if (job.loss) *job.loss_of(i) = 0;
  if (job.task != Task::kStats) return;
  job.logsumexp[i] = job.entropy[i] = __builtin_nan("");
  job.argmax[i] = -1;
  if (job.target_logprob) job.target_logprob[i] = __builtin_nan("");
  if (job.target_rank) job.target_rank[i] = -1;
}

// Does the fast kernel (Kernels::rows) take this job?
inline bool fast_rows(const RowJob& job) {
  const bool index = job.task == Task::kLoss && job.kind == Target::kIndex;
  const bool plain = job.task == Task::kSoftmax || job.task == Task::kLogSoftmax;
  // Smoothing needs sum_j z_j, which one float64 cannot hold well enough beside float64 logits.
  const bool smooth = job.off != 0;
  // Sums that end in float64 are better compensated throughout.
  const bool stats = job.task == Task::kStats && job.logits.dtype != Dtype::kFloat64;
  return job.softcap == 0 && (plain || index || stats) &&
         (!smooth || (!job.class_weight && job.logits.dtype != Dtype::kFloat64));
}

// Few enough classes that one row a lane is faster than one row after the other? The layout has no
// say, so that it never changes a bit.
inline bool lane_rows(const RowJob& job, int64_t lane_classes) {
  return fast_rows(job) && job.task != Task::kStats && job.logits.dtype != Dtype::kFloat64 &&
         job.logits.classes <= lane_classes;
}

// The same for Hessian-vector products, which are double whatever the dtype.
inline bool lane_hvp(const RowJob& job) {
  return job.task == Task::kHvp && job.kind == Target::kIndex && job.softcap == 0 &&
         (job.off == 0 || !job.class_weight) && job.logits.classes <= 64;
}

// Is a row one block? The row's numbers are then worked out for several rows at once.
inline bool short_rows(const RowJob& job) {
  return fast_rows(job) && job.task != Task::kStats && job.logits.dtype != Dtype::kFloat64 &&
         job.logits.classes <= 4096;
}

// Is a row better served in parts by `n_threads`? It is where its e would take memory of the
// output's order, or rows are too few for the threads. It changes no bits.
inline bool in_parts(const RowJob& job, int n_threads) {
  const int64_t compute = job.logits.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t bytes = job.logits.classes * compute;
  return fast_rows(job) && !short_rows(job) && job.logits.contiguous_rows() &&
         (!job.out.data || job.out.contiguous_rows()) &&
         (bytes >= 32 * kPartBytes || (job.n_rows < n_threads && bytes >= 2 * kPartBytes));
}

}  // namespace crossent
