// The row kernel for index targets, softmax and log-softmax: one row is one pass over its logits.
//
// Design:
//   a. A row is worked off in blocks of fixed size that stay in the L1 cache: their maximum, then
//      e = exp(z - reference) * 2^K to a scratch row and their mass (the sum of e). The row's
//      gradient is then the scratch times one number a block. What a row gives depends on the row
//      alone.
//   b. A block's reference is an integer power of two near its maximum, so joining blocks is exact,
//      and the origin subtracted from z is 0 unless |maximum| >= limit, where it is the maximum
//      itself: z - origin is exact for every logit that matters (Sterbenz), and so no rounding
//      error of z - m has to be kept.
//   c. The target is left out of the mass: U = sum_{j != t} e_j. Then -U/S is the target's gradient
//      and log1p(U / e_t) its loss, with no cancellation at a confident row. A target below the
//      maximum m has the loss (m - z_t) + log(S / e_m).
//   d. K keeps every e that can show in a result a normal number; underflow happens once, in the
//      last multiplication. K follows the row's scale r, so r / S never underflows either.
//   e. float lanes are summed in double; double lanes with TwoSum. The last factor is split in two
//      (high + low), which removes its rounding.
#include "rows.h"

#include <cmath>

#include "blocks.h"
#include "exp.h"
#include "feed.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {

void serve_general(const RowJob& job, int64_t begin, int64_t end);  // general.cpp

namespace {

// The rows of one storage type.
template <class S>
class Rows {
  using T = typename S::T;
  using Type = typename S::Type;
  static constexpr int64_t kBlock = kBlockBytes / sizeof(T);
  static constexpr bool kPlain = sizeof(Type) == sizeof(T);

 public:
  explicit Rows(const RowJob& job)
      : job_(job),
        V_(job.logits.classes),
        n_blocks_((V_ + kBlock - 1) / kBlock),
        streams_(streams<S>(job)) {}

  // False: no memory.
  bool prepare() {
    blocks_ = static_cast<Block<T>*>(scratch(0, n_blocks_ * int64_t{sizeof(Block<T>)}));
    if (job_.out.data) e_ = static_cast<T*>(scratch(1, V_ * int64_t{sizeof(T)}));
    if (!kPlain) numbers_ = static_cast<T*>(scratch(6, kBlockBytes));
    return blocks_ && (e_ || !job_.out.data) && (numbers_ || kPlain);
  }

  // May the row be served in lanes of T? Its scale must leave the bias K room.
  bool takes(int64_t i) const {
    const double r = job_.row_scale(i) * weight(i), u = r * job_.row_upstream(i);
    const int top = Limits<T>::highest_scale;
    const int a = r == 0 ? 0 : exponent(r), b = u == 0 ? a : exponent(u);
    return a <= top && b <= top && a - b < 20;
  }

  // False, and nothing is written: not for lanes of T after all.
  bool loss(int64_t i, const Type* z, Type* g) const {
    const double r = job_.row_scale(i), u = r * job_.row_upstream(i);
    const double w = weight(i);
    const int64_t t = job_.target[i];
    const bool smooth = job_.off != 0;
    const double scale = job_.logit_scale, z_t = first(z + t);
    const int bias = bias_for(r * w, u * w);
    if (g && streams_) __builtin_prefetch(g, 1), __builtin_prefetch(g + V_, 1);
    read(z, t, smooth, g != nullptr, bias);
    const RowSums<T> row = join_blocks(blocks_, n_blocks_, scale);

    // lse - z at the maximum and at the target, and lse itself.
    const Word all = row.all();
    const double s = all.hi, e_t = row.excluded_e, u_mass = row.mass.value();
    const double below = scale * (row.m - z_t);
    const double top = z_t == row.m ? std::log1p(u_mass / e_t)
                                    : std::log(s / max_e(blocks_[row.top], scale, bias));
    const double nll = below == 0 ? top : below + top;
    const double lse = scale * row.m + top, z_loss = job_.z_loss;
    const double q_t = job_.on + job_.off, q = job_.on + V_ * job_.off;
    const double more = z_loss != 0 ? 2 * z_loss * lse : 0;
    if (std::fabs(more) > kMostZLoss) return false;
    if (job_.loss) {
      // A class of weight 0 costs nothing, at -inf either; only a NaN comes through.
      double loss = w == 0 ? lse : nll;
      if (smooth) loss = (job_.on == 0 ? 0 : job_.on * nll) + job_.off * spread(row, top);
      if (z_loss != 0) loss += q * z_loss * lse * lse;
      job_.loss[i] = r * w * loss;
    }
    if (!g) return true;
    const double coefficient = u * w * scale;
    const double others = smooth ? (V_ - 1) * job_.off : 0;  // the q beside the target's
    const double p_t = e_t / s;
    double at_target = -q_t * (u_mass / s);
    if (smooth || z_loss != 0) at_target += p_t * others + more * q * p_t;
    write(g, all, coefficient * (q + q * more), coefficient * job_.off, t, coefficient * at_target);
    return true;
  }

  void softmax(const Type* z, Type* p) const {
    const int bias = bias_for(1, 1);
    read(z, -1, false, true, bias);
    const RowSums<T> row = join_blocks(blocks_, n_blocks_, job_.logit_scale);
    write(p, row.all(), 1, 0, -1, 0);
  }

  void log_softmax(const Type* z, Type* out) const {
    const int bias = bias_for(1, 1);
    read(z, -1, false, true, bias, true);
    RowSums<T> row = join_blocks(blocks_, n_blocks_, job_.logit_scale);
    // Every block left its own maximum out; all but the row's come back.
    for (int64_t b = 0; b < n_blocks_; b++)
      if (b != row.top) row.mass.add(blocks_[b].excluded_e * blocks_[b].factor);
    const double beside =
        std::log1p(row.mass.value() / max_e(blocks_[row.top], job_.logit_scale, bias));
    const auto m = splat(static_cast<T>(row.m)), tau = splat(static_cast<T>(job_.logit_scale));
    const auto rest = splat(static_cast<T>(beside));
    constexpr int L = Lanes<T>::n;
    for (int64_t j = 0; j < V_; j += L) {
      const int count = V_ - j < L ? static_cast<int>(V_ - j) : L;
      const auto y = tau * (load_some<T>(e_ + j, count, T(0)) - m) - rest;
      count == L ? S::store(out + j, y) : store_part<S>(out + j, count, y);
    }
  }

 private:
  double weight(int64_t i) const {
    return job_.class_weight && job_.kind == Target::kIndex ? job_.class_weight[job_.target[i]]
                                                            : 1.0;
  }

  static double first(const Type* p) { return load_part<S>(p, 1, T(0))[0]; }

  static int bias_for(double r, double u) {
    const int a = r == 0 ? 0 : exponent(r), b = u == 0 ? a : exponent(u);
    const int bias = (a > b ? a : b) + Limits<T>::headroom;
    return bias > Limits<T>::lowest_shift ? bias : Limits<T>::lowest_shift;
  }

  // Reads all blocks; the scratch row takes e. For log-softmax it takes the logits, and every block
  // leaves its own maximum out.
  void read(const Type* z, int64_t excluded, bool smooth, bool keep, int bias,
            bool logits = false) const {
    const double scale = job_.logit_scale;
    for (int64_t b = 0; b < n_blocks_; b++) {
      const int64_t begin = b * kBlock, n = V_ - begin < kBlock ? V_ - begin : kBlock;
      Block<T>& block = blocks_[b];
      const T* from = numbers(z + begin, n);
      block.max = block_max(from, n);
      choose_reference(block, scale);
      int64_t out = excluded >= begin && excluded < begin + n ? excluded - begin : -1;
      if (logits) {
        out = first_equal(from, n, block.max);
        __builtin_memcpy(e_ + begin, from, static_cast<size_t>(n) * sizeof(T));
      }
      read_block(from, keep && !logits ? e_ + begin : nullptr, n, out, scale, bias, block,
                 reinterpret_cast<const char*>(z + begin + kBlock), sizeof(Type));
      if (smooth) block.sum = block_sum(from, n, block.origin);
    }
  }

  // A block's logits in the compute type.
  const T* numbers(const Type* z, int64_t n) const {
    if constexpr (kPlain) {
      return z;
    } else {
      return widen_block<S>(z, n, numbers_);
    }
  }

  // sum_j (lse - z_j)
  double spread(const RowSums<T>& row, double top) const {
    double below = 0;
    for (int64_t b = 0; b < n_blocks_; b++) {
      const int64_t n = b + 1 < n_blocks_ ? kBlock : V_ - b * kBlock;
      below += n * (row.m - blocks_[b].origin) - blocks_[b].sum;
    }
    return V_ * top + job_.logit_scale * below;
  }

  // out = e * coefficient / all - offset, but `value` at entry `at` (-1: none).
  void write(Type* out, Word all, double coefficient, double offset, int64_t at,
             double value) const {
    for (int64_t b = 0; b < n_blocks_; b++) {
      const int64_t begin = b * kBlock, n = V_ - begin < kBlock ? V_ - begin : kBlock;
      Finish<T> f(coefficient, all, blocks_[b].factor, offset);
      if (at >= begin && at < begin + n) f.at = at - begin, f.value = value;
      finish_block<S>(e_ + begin, out + begin, n, f, streams_);
    }
  }

  const RowJob& job_;
  const int64_t V_, n_blocks_;
  const bool streams_;
  Block<T>* blocks_ = nullptr;
  T *e_ = nullptr, *numbers_ = nullptr;
};

template <class S>
void serve(const RowJob& job, int64_t begin, int64_t end) {
  using Type = typename S::Type;
  Rows<S> rows(job);
  Feed<Type> feed(job, 2);
  if (!rows.prepare() || !feed.prepare()) return report_out_of_memory(job);
  const int64_t V = job.logits.classes;
  for (int64_t i = begin; i < end; i = feed.next()) {
    feed.read(i, end);
    for (int64_t k = i; k < feed.next(); k++) {
      const Type* z = feed.in(k);
      Type* out = feed.out(k);
      if (job.dropped(k)) {
        if (job.loss) job.loss[k] = 0;
        if (out) __builtin_memset(out, 0, static_cast<size_t>(V) * sizeof(Type));
      } else if (job.task == Task::kSoftmax) {
        rows.softmax(z, out);
      } else if (job.task == Task::kLogSoftmax) {
        rows.log_softmax(z, out);
      } else if (!rows.takes(k) || !rows.loss(k, z, out)) {
        feed.leave(k);  // general writes its row itself
        serve_general(job, k, k + 1);
      }
    }
    feed.write();
  }
  stream_fence();
}

}  // namespace

void serve_rows(const RowJob& job, int64_t begin, int64_t end) {
  switch (job.logits.dtype) {
    case Dtype::kFloat16:
      return serve<Stored<Dtype::kFloat16>>(job, begin, end);
    case Dtype::kBFloat16:
      return serve<Stored<Dtype::kBFloat16>>(job, begin, end);
    case Dtype::kFloat32:
      return serve<Stored<Dtype::kFloat32>>(job, begin, end);
    case Dtype::kFloat64:
      return serve<Stored<Dtype::kFloat64>>(job, begin, end);
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
