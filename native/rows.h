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

  char* row(int64_t i) const {
    if (outer == 1) return data + i * inner_stride;  // a division takes as long as a short row
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

  double* loss = nullptr;  // (N,) or null
  double* logsumexp = nullptr;
  double* target_logprob = nullptr;
  double* entropy = nullptr;
  int64_t* argmax = nullptr;
  int64_t* target_rank = nullptr;

  bool* no_memory = nullptr;  // set by report_out_of_memory

  bool dropped(int64_t i) const {
    return (kind == Target::kIndex && target[i] == skip) || (row_weight && row_weight[i] == 0);
  }
  double row_scale(int64_t i) const { return (row_weight ? row_weight[i] : 1.0) / divisor; }
  double row_upstream(int64_t i) const { return upstream ? upstream[i] : upstream_all; }
};

// One instruction set's kernels. All serve rows [begin, end) and are safe to call from many
// threads.
struct Kernels {
  // Index targets and none, float compute, few classes: one row a lane, in any layout (lanes.cpp).
  void (*lanes)(const RowJob&, int64_t begin, int64_t end);
  // The same for more classes, as long as a row is one block (short.cpp).
  void (*short_rows)(const RowJob&, int64_t begin, int64_t end);
  // Index targets and none, in lanes of the compute dtype: see rows.cpp for what it takes.
  void (*rows)(const RowJob&, int64_t begin, int64_t end);
  // Everything, in lanes of float64.
  void (*general)(const RowJob&, int64_t begin, int64_t end);
};

// Thread-local memory, aligned to 64 bytes, contents unspecified; null when there is none left.
// The same slot's earlier memory is gone after a larger request.
void* scratch(int slot, int64_t bytes);
// A kernel that got no memory says so; the host raises when all threads are done.
void report_out_of_memory(const RowJob& job);

// Does the fast kernel (Kernels::rows) take this job?
inline bool fast_rows(const RowJob& job) {
  const bool index = job.task == Task::kLoss && job.kind == Target::kIndex;
  const bool plain = job.task == Task::kSoftmax || job.task == Task::kLogSoftmax;
  // Smoothing needs sum_j z_j, which one float64 cannot hold well enough beside float64 logits.
  const bool smooth = job.off != 0;
  return job.softcap == 0 && (plain || index) &&
         (!smooth || (!job.class_weight && job.logits.dtype != Dtype::kFloat64));
}

// Few enough classes that one row a lane is faster than one row after the other? The layout has no
// say, so that it never changes a bit.
inline bool lane_rows(const RowJob& job) {
  return fast_rows(job) && job.logits.dtype != Dtype::kFloat64 && job.logits.classes <= 48;
}

// Is a row one block? The row's numbers are then worked out for several rows at once.
inline bool short_rows(const RowJob& job) {
  return fast_rows(job) && job.logits.dtype != Dtype::kFloat64 && job.logits.classes <= 4096;
}

}  // namespace crossent
