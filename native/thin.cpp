#include "thin.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "along.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"
#include "total.h"

namespace crossent {
namespace {

constexpr int64_t kSlots = 16, kFewestSlots = 4, kSlotBytes = int64_t{16} << 20;
constexpr int64_t kMostClasses = 64;
// Of the features in a block: with the weights and the slot's gradient they stay in the L2 cache.
constexpr int64_t kBlockBytes = int64_t{1} << 17, kMostRows = 240;
constexpr int64_t kTileFeatures = 96;
// Of a block's sums in lanes (along.h), which stay in the L1 cache; whole tiles of most heights.
constexpr int64_t kPartBytes = int64_t{1} << 14, kAlongRows = 12;
constexpr int kLosses = 7, kLogits = 8, kPacked = 9, kGradient = 10, kPart = 11;  // scratch

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t slots_for(int64_t n_classes, int64_t n_features, int64_t size) {
  // (Padded to 64 at most: the instruction set must not decide.)
  return std::min(kSlots, kSlotBytes / std::max<int64_t>(1, 64 * n_features * size)) *
         (n_classes <= kMostClasses && n_features > 0);
}

template <class T>
class Thin {
 public:
  Thin(const ThinJob& job, bool (*poll)(void*), void* poll_context)
      : job_(job),
        kernels_(gemm_kernels().of(job.wide, job.w.rows)),
        columns_(gemm_kernels().of(job.wide, job.x.cols)),
        serve_(row_kernel(row_job(job))),
        N_(job.x.rows),
        D_(job.x.cols),
        V_(job.w.rows),
        panels_(ceiling(V_, kernels_.panel)),
        width_(panels_ * kernels_.panel),
        sets_(job.along_w.data ? 2 : 1),
        along_table_(along_kernels()),
        along_kernels_(job.wide ? along_table_.wide : along_table_.narrow),
        along_(V_ <= along_table_.most_classes),
        along_width_(along_kernels_.width(D_)),
        poll_(poll),
        poll_context_(poll_context) {
    job_.rows.no_memory = &no_memory_;
    job_.rows.bad_target = &bad_target_;
    const int64_t fit = kBlockBytes / std::max<int64_t>(1, D_ * size_of(job.x.dtype));
    const int64_t parts = kPartBytes / (V_ * lane_bytes());
    const int64_t most = along_ ? std::min(kMostRows, parts) : kMostRows;
    const int64_t strip = along_ ? kAlongRows : kernels_.strip;
    block_ = std::max<int64_t>(1, std::min(most, fit) / strip) * strip;
    slots_ = std::min(slots_for(V_, D_, kSize), std::max<int64_t>(1, ceiling(N_, block_)));
  }

  Outcome operator()(double* total) {
    const OwnScratch scratch;
    if (!prepare()) return Outcome::kOutOfMemory;
    std::unique_ptr<double[]> sums(new double[static_cast<size_t>(slots_)]());
    const auto slot = [&](int64_t s) {
      sums[static_cast<size_t>(s)] = serve(s, total != nullptr);
      trim_scratch();
    };
    if (!parallel_for(slots_, slot, poll_, poll_context_)) return Outcome::kCancelled;
    if (no_memory_) return Outcome::kOutOfMemory;
    if (bad_target_) return Outcome::kBadTarget;
    const auto features = [&](int64_t i) { add_up(i * kTileFeatures); };
    if (job_.dw && !parallel_for(ceiling(D_, kTileFeatures), features, poll_, poll_context_))
      return Outcome::kCancelled;
    if (job_.db) add_up_bias();
    if (total) {
      Total all;
      all.add(sums.get(), slots_);
      *total = all.value();
    }
    return Outcome::kDone;
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  static RowJob row_job(const ThinJob& job) {
    RowJob rows = job.rows;
    rows.logits.dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    return rows;
  }

  bool prepare() {
    weights_ = allocate(sets_ * set_bytes());
    bias_ = allocate(2 * width_ * kSize);
    if (job_.dw) gradients_ = allocate(slots_ * set_bytes());
    if (job_.db) biases_ = allocate(slots_ * width_ * int64_t{sizeof(double)});
    if (job_.dx) across_ = allocate(ceiling(D_, columns_.panel) * columns_.panel * V_ * kSize);
    if (!weights_ || !bias_ || (job_.dw && !gradients_) || (job_.db && !biases_) ||
        (job_.dx && !across_))
      return false;
    std::memset(bias_.get(), 0, static_cast<size_t>(2 * width_ * kSize));
    if (job_.bias) std::memcpy(bias_.get(), job_.bias, static_cast<size_t>(V_ * kSize));
    if (job_.along_bias)
      std::memcpy(along_bias(), job_.along_bias, static_cast<size_t>(V_ * kSize));
    pack(job_.w, 0);
    if (sets_ > 1) pack(job_.along_w, 1);
    GemmJob packing;
    packing.packed = {job_.w.data, job_.w.dtype, D_, job_.w.col_stride, job_.w.row_stride};
    for (int64_t j = 0; job_.dx && j < ceiling(D_, columns_.panel); j++)
      columns_.pack(packing, 0, V_, j, across_.get() + j * columns_.panel * V_ * kSize);
    return true;
  }

  int64_t lane_bytes() const { return along_table_.lanes * int64_t{sizeof(float)}; }

  // Of W as it is packed or copied, and of a slot's gradient.
  int64_t set_bytes() const { return (along_ ? V_ * along_width_ : width_ * D_) * kSize; }

  void pack(const Matrix& w, int64_t set) {
    char* const at = weights_.get() + set * set_bytes();
    if (along_) return along_kernels_.copy(w, at);
    GemmJob packing;
    packing.packed = {w.data, w.dtype, V_, w.row_stride, w.col_stride};
    const int64_t bytes = kernels_.panel * D_ * kSize;
    for (int64_t j = 0; j < panels_; j++) kernels_.pack(packing, 0, D_, j, at + j * bytes);
  }

  // One slot's rows; returns the sum of their losses.
  double serve(int64_t s, bool sum) {
    const int64_t begin = N_ * s / slots_, end = N_ * (s + 1) / slots_;
    const int64_t row = width_ * kSize;
    auto* z = static_cast<char*>(scratch(kLogits, block_ * sets_ * row));
    auto* g = sets_ > 1 ? static_cast<char*>(scratch(kGradient, block_ * row)) : z;
    auto* losses = static_cast<double*>(scratch(kLosses, block_ * int64_t{sizeof(double)}));
    // Where g is packed; or x copied, and the logits' sums in lanes.
    char *packed = g, *part = z;
    if (along_ ? !readable() : panels_ > 1 && job_.dw)
      packed = static_cast<char*>(scratch(kPacked, block_ * (along_ ? along_width_ * kSize : row)));
    if (along_) part = static_cast<char*>(scratch(kPart, block_ * V_ * lane_bytes()));
    if (!z || !g || !packed || !part || !losses) return report_out_of_memory(job_.rows), 0;
    if (job_.dw) std::memset(gradient(s), 0, static_cast<size_t>(set_bytes()));
    if (job_.db) std::memset(bias_of(s), 0, static_cast<size_t>(width_ * int64_t{sizeof(double)}));
    Total total;
    for (int64_t i = begin; i < end && !stop_wanted(); i += block_) {
      const int64_t n = std::min(block_, end - i);
      Next next = next_rows(i + n, end);
      AlongJob block;
      if (along_) {
        block = block_of(i, n, packed);
        logits(block, z, part, next);
      } else {
        logits(i, n, z, next);
      }
      RowJob rows = row_job(job_);
      rows.logits = view_of(i, z, sets_ * row);
      if (rows.task == Task::kHvp)
        rows.vector = sets_ > 1 ? view_of(i, z + row, sets_ * row) : view_of(i, along_bias(), 0);
      if (job_.dx || job_.dw || job_.db) rows.out = view_of(i, g, row);
      if (sum) rows.loss = losses, rows.first_loss = i;
      serve_(rows, i, i + n);
      if (sum) total.add(losses, n);
      if (job_.dw && along_) {
        along_kernels_.gradient(block, g, width_, gradient(s), next.lines(next.bytes));
      } else if (job_.dw) {
        weight_gradient(i, n, g, packed, gradient(s), next);
      }
      if (job_.db) bias_gradient(n, g, bias_of(s));
      if (job_.dx) input_gradient(i, n, g);
    }
    return total.value();
  }

  // Rows of classes, `stride` bytes apart; row i is the first.
  View view_of(int64_t i, char* data, int64_t stride) const {
    View view;
    view.dtype = row_job(job_).logits.dtype;
    view.outer = 1;
    view.classes = V_;
    view.inner = N_;
    view.class_stride = kSize;
    view.inner_stride = stride;
    view.data = data - i * stride;
    view.padded = true;
    return view;
  }

  // The rows of x that come next in a slot, as far as they are not asked for yet.
  struct Next {
    const char* at;
    int64_t bytes;
    Ahead lines(int64_t n) {
      const Ahead ahead = {at, n / 64};
      at += n;
      bytes -= n;
      return ahead;
    }
  };
  Next next_rows(int64_t i, int64_t end) const {
    const int64_t row = D_ * size_of(job_.x.dtype);
    const bool dense = job_.x.row_stride == row && job_.x.col_stride == size_of(job_.x.dtype);
    const int64_t n = dense ? std::max<int64_t>(0, std::min(block_, end - i)) : 0;
    return {job_.x.data + (n > 0 ? i * row : 0), n * row};
  }
  static void fetch(GemmJob& job, Next& next, int64_t bytes) {
    job.ahead = next.lines(bytes).at;
    job.ahead_bytes = bytes;
  }

  // Is x as along.h reads it: rows of contiguous numbers that are computed in T?
  bool readable() const {
    const bool same = (job_.x.dtype == Dtype::kFloat64) == job_.wide;
    return same && (job_.x.col_stride == size_of(job_.x.dtype) || D_ == 1);
  }

  // Rows of x where they lie, or copied to `copy`.
  AlongJob block_of(int64_t i, int64_t n, char* copy) const {
    AlongJob job;
    job.n = n;
    job.n_features = D_;
    job.n_classes = V_;
    job.width = along_width_;
    Matrix rows = job_.x;
    rows.data += i * rows.row_stride;
    rows.rows = n;
    if (readable()) {
      job.x = rows.data;
      job.dtype = rows.dtype;
      job.row_stride = rows.row_stride;
    } else {
      along_kernels_.copy(rows, copy);
      job.x = copy;
      job.dtype = row_job(job_).logits.dtype;
      job.row_stride = along_width_ * kSize;
    }
    return job;
  }

  // As below, with lanes along the features.
  void logits(const AlongJob& block, char* z, char* part, Next& next) const {
    for (int64_t set = 0; set < sets_; set++) {
      const int64_t bytes = set > 0 ? 0 : job_.dw ? next.bytes / 2 : next.bytes;
      along_kernels_.logits(block, weights_.get() + set * set_bytes(),
                            bias_.get() + set * width_ * kSize, z + set * width_ * kSize,
                            sets_ * width_, part, next.lines(bytes));
    }
  }

  Side rows_of_x(int64_t i, int64_t n) const {
    return {job_.x.data + i * job_.x.row_stride, job_.x.dtype, n, job_.x.row_stride,
            job_.x.col_stride};
  }

  // A row of z is x Wᵀ + b and, if there is a second set of weights, what follows from that one.
  void logits(int64_t i, int64_t n, char* z, Next& next) {
    GemmJob job = product(D_);
    job.streamed = rows_of_x(i, n);
    fetch(job, next, job_.dw ? next.bytes / 2 : next.bytes);
    job.packed.n = sets_ * width_;
    job.out = z;
    job.out_stride = sets_ * width_;
    job.bias = job_.bias || job_.along_bias ? bias_.get() : nullptr;
    kernels_.tile(job, 0, D_, 0, n, 0, sets_ * panels_, weights_.get());
  }

  // The slot's (D, width) += xᵀ g.
  void weight_gradient(int64_t i, int64_t n, const char* g, char* packed, char* out, Next& next) {
    GemmJob job = product(n);
    const Side rows = rows_of_x(i, n);
    job.streamed = {rows.data, rows.dtype, D_, rows.depth_stride, rows.stride};
    job.packed = {g, row_job(job_).logits.dtype, width_, kSize, width_ * kSize};
    job.out = out;
    job.out_stride = width_;
    job.accumulate = true;
    for (int64_t j = 0; panels_ > 1 && j < panels_; j++)
      kernels_.pack(job, 0, n, j, packed + j * kernels_.panel * n * kSize);
    // Whole strips apart from the rest: those are added where they lie.
    const int64_t whole = D_ / kernels_.strip * kernels_.strip;
    const int64_t step = ceiling(kTileFeatures, kernels_.strip) * kernels_.strip;
    const int64_t each = next.bytes / std::max<int64_t>(1, ceiling(whole, step));
    for (int64_t d = 0; d < whole; d += step) {
      fetch(job, next, each);
      kernels_.tile(job, 0, n, d, std::min(whole, d + step), 0, panels_, packed);
    }
    job.ahead_bytes = 0;
    if (whole < D_) kernels_.tile(job, 0, n, whole, D_, 0, panels_, packed);
  }

  void bias_gradient(int64_t n, const char* g, double* out) const {
    const T* at = reinterpret_cast<const T*>(g);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < V_; j++) out[j] += static_cast<double>(at[i * width_ + j]);
  }

  void input_gradient(int64_t i, int64_t n, const char* g) {
    GemmJob job = product(V_);
    job.streamed = {g, row_job(job_).logits.dtype, n, width_ * kSize, kSize};
    job.packed.n = D_;
    job.out = job_.dx + i * job_.dx_stride * kSize;
    job.out_stride = job_.dx_stride;
    const int64_t panels = ceiling(D_, columns_.panel), whole = D_ / columns_.panel;
    const int64_t step = 4;
    for (int64_t j = 0; j < whole; j += step)
      columns_.tile(job, 0, V_, 0, n, j, std::min(whole, j + step), across_.get());
    if (whole < panels) columns_.tile(job, 0, V_, 0, n, whole, panels, across_.get());
  }

  GemmJob product(int64_t depth) {
    GemmJob job;
    job.depth = depth;
    job.wide = job_.wide;
    job.no_memory = &no_memory_;
    return job;
  }

  // The slots' gradients of kTileFeatures features, from d0 on, to the weights' own.
  void add_up(int64_t d0) const {
    const int64_t end = std::min(D_, d0 + kTileFeatures);
    for (int64_t v = 0; v < V_; v++) {
      T* out = reinterpret_cast<T*>(job_.dw) + v * job_.dw_stride;
      for (int64_t d = d0; d < end; d++) {
        T sum = 0;
        for (int64_t s = 0; s < slots_; s++)
          sum += reinterpret_cast<const T*>(
              gradient(s))[along_ ? v * along_width_ + d : d * width_ + v];
        out[d] = job_.accumulate ? out[d] + sum : sum;
      }
    }
  }

  void add_up_bias() const {
    T* out = reinterpret_cast<T*>(job_.db);
    for (int64_t v = 0; v < V_; v++) {
      double sum = 0;
      for (int64_t s = 0; s < slots_; s++) sum += bias_of(s)[v];
      out[v] = job_.accumulate ? static_cast<T>(out[v] + sum) : static_cast<T>(sum);
    }
  }

  char* along_bias() const { return bias_.get() + width_ * kSize; }
  char* gradient(int64_t s) const { return gradients_.get() + s * set_bytes(); }
  double* bias_of(int64_t s) const { return reinterpret_cast<double*>(biases_.get()) + s * width_; }

  ThinJob job_;
  const GemmKernels &kernels_, &columns_;  // V wide; D wide, for the gradient in x
  const RowKernel serve_;
  const int64_t N_, D_, V_, panels_, width_;
  const int64_t sets_;  // of weights: W, and a direction in it
  const AlongTable& along_table_;
  const AlongKernels& along_kernels_;
  const bool along_;           // few enough classes for lanes along the features
  const int64_t along_width_;  // of their rows of W
  bool (*const poll_)(void*);
  void* const poll_context_;
  int64_t block_ = 1, slots_ = 1;  // rows of a block
  Memory weights_, across_, bias_, gradients_, biases_;
  bool no_memory_ = false, bad_target_ = false;
};

}  // namespace

bool thin(int64_t n_classes, int64_t n_features, bool wide) {
  return slots_for(n_classes, n_features, wide ? 8 : 4) >= kFewestSlots;
}

Outcome run_thin(const ThinJob& job, double* total, bool (*poll)(void*), void* poll_context) {
  return job.wide ? Thin<double>(job, poll, poll_context)(total)
                  : Thin<float>(job, poll, poll_context)(total);
}

}  // namespace crossent
