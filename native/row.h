// One row of one or more blocks: read, its numbers, written. rows.cpp says why it is done so.
#pragma once

#include <cmath>

#include "blocks.h"
#include "exp.h"
#include "rows.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

template <class S>
class Row {
 public:
  using T = typename S::T;
  using Type = typename S::Type;
  static constexpr int64_t kBlock = kBlockBytes / sizeof(T);

  // What is known before the row is read, and what its numbers come to.
  struct State {
    int64_t i, t;    // the row and its target, -1: none
    double r, u, w;  // scale, times the upstream gradient, class weight
    double z_t;
    int bias;
    Word all;  // the gradient is e coefficient / all - offset, but value at entry t
    double coefficient, offset, value;
    double m, log_all;  // the maximum and lse - z there, for log-softmax and statistics
  };

  explicit Row(const RowJob& job)
      : job_(job),
        V_(job.logits.classes),
        n_blocks_((V_ + kBlock - 1) / kBlock),
        leaves_max_(job.task == Task::kLogSoftmax || job.task == Task::kStats),
        streams_(streams<S>(job)) {}

  int64_t n_blocks() const { return n_blocks_; }

  // False: no memory. With `whole` the blocks of a row and its e have scratch of their own.
  bool prepare(bool whole) {
    const bool keep = whole && job_.out.data && !leaves_max_;
    wide_ = static_cast<T*>(scratch(6, kBlockBytes));
    e_ = static_cast<T*>(scratch(1, keep ? V_ * int64_t{sizeof(T)} + kBytes : kBlockBytes));
    if (whole) blocks_ = static_cast<Block<T>*>(scratch(0, n_blocks_ * int64_t{sizeof(Block<T>)}));
    keep_ = keep;
    return wide_ && e_ && (blocks_ || !whole);
  }
  void use(Block<T>* blocks) { blocks_ = blocks; }

  // False: its scale leaves the bias no room, so it is not for lanes of T.
  bool start(int64_t i, const Type* z, State* row) const {
    *row = {};
    row->i = i;
    int64_t t;
    row->t = job_.kept(i, &t) && job_.kind == Target::kIndex ? t : -1;
    row->r = row->u = row->w = 1;
    if (job_.task == Task::kLoss) {
      row->w = job_.class_weight && row->t >= 0 ? job_.class_weight[row->t] : 1.0;
      row->r = job_.row_scale(i);
      row->u = row->r * job_.row_upstream(i);
    }
    if (row->t >= 0) row->z_t = load_part<S>(z + row->t, 1, T(0))[0];
    // What multiplies e: the logits' scale too, where it could lift exp's floor into sight.
    const double r = row->r * row->w, u = row->u * row->w * std::fmax(job_.logit_scale, 1.0);
    const int a = r == 0 ? 0 : exponent(r), b = u == 0 ? a : exponent(u);
    const int bias = (a > b ? a : b) + Limits<T>::headroom, top = Limits<T>::highest_scale;
    row->bias = bias > Limits<T>::lowest_shift ? bias : Limits<T>::lowest_shift;
    return a <= top && b <= top && a - b < 20;
  }

  // Reads blocks [first, last).
  void read(const State& row, const Type* z, int64_t first, int64_t last) const {
    const double scale = job_.logit_scale;
    const bool stats = job_.task == Task::kStats;
    for (int64_t b = first; b < last; b++) {
      const int64_t begin = b * kBlock, n = size(b);
      Block<T>& block = blocks_[b];
      const T* from = widened(z + begin, n);
      block.max = block_max(from, n);
      choose_reference(block, scale);
      // For log-softmax and statistics every block leaves its own first maximum out.
      const int64_t out = leaves_max_ ? first_equal(from, n, block.max)
                          : row.t >= begin && row.t < begin + n && job_.task == Task::kLoss
                              ? row.t - begin
                              : -1;
      T* e = keep_ ? e_ + begin : e_;
      exponentials(from, e, n, scale, row.bias, block, z + begin + kBlock);
      find_mass(e, n, out, block);
      if (job_.off != 0) block.sum = block_sum(from, n, block.origin);
      if (stats) {
        block.sum = sum_below(from, e, n, block.max, scale);
        block.above = row.t < 0 ? 0 : count_above(from, n, static_cast<T>(row.z_t));
      }
    }
  }

  // Joins the blocks; writes the loss or the statistics. False, and nothing is written: not for
  // lanes of T after all.
  bool finish_numbers(State* state, const Type* z) const {
    State& row = *state;
    const double scale = job_.logit_scale;
    RowSums<T> sums = join_blocks(blocks_, n_blocks_, scale);
    row.coefficient = 1;
    if (job_.task == Task::kLoss) return loss(state, sums);
    if (leaves_max_) {
      // All maxima but the row's come back.
      for (int64_t b = 0; b < n_blocks_; b++)
        if (b != sums.top)
          sums.mass.add(blocks_[b].excluded_e * blocks_[b].factor * blocks_[b].lift);
      sums.excluded_e = blocks_[sums.top].excluded_e;
      row.m = sums.m;
      row.log_all = std::log1p(sums.mass.value() / max_e(blocks_[sums.top], scale, row.bias));
    }
    row.all = sums.all();
    if (job_.task == Task::kStats) stats(row, sums, z);
    row.t = -1;
    return true;
  }

  // Writes blocks [first, last) of the output, from the e kept or, `again`, from the logits.
  void write(const State& row, const Type* z, Type* out, int64_t first, int64_t last,
             bool again) const {
    for (int64_t b = first; b < last; b++) {
      const int64_t begin = b * kBlock, n = size(b);
      if (job_.task == Task::kLogSoftmax) {
        write_logs(row, z + begin, out + begin, n);
        continue;
      }
      T* e = again ? e_ : e_ + begin;
      if (again) {
        exponentials(widened(z + begin, n), e, n, job_.logit_scale, row.bias, blocks_[b],
                     z + begin + kBlock);
      }
      Finish<T> f(row.coefficient, row.all, blocks_[b].factor, blocks_[b].lift, row.offset);
      if (row.t >= begin && row.t < begin + n) f.at = row.t - begin, f.value = row.value;
      finish_block<S>(e, out + begin, n, f, streams_);
    }
  }

 private:
  int64_t size(int64_t b) const { return b + 1 < n_blocks_ ? kBlock : V_ - b * kBlock; }

  // A block's logits in the compute type.
  const T* widened(const Type* z, int64_t n) const {
    if constexpr (sizeof(Type) == sizeof(T)) {
      return z;
    } else {
      return widen_block<S>(z, n, wide_);
    }
  }

  bool loss(State* state, const RowSums<T>& sums) const {
    State& row = *state;
    const double scale = job_.logit_scale, z_loss = job_.z_loss;
    const bool smooth = job_.off != 0;
    // lse - z at the maximum and at the target, and lse itself.
    const Word all = sums.all();
    const double s = all.hi, e_t = sums.excluded_e, u_mass = sums.mass.value();
    const double below = scale * (sums.m - row.z_t);
    const double top = row.z_t == sums.m ? std::log1p(u_mass / e_t)
                                         : std::log(s / max_e(blocks_[sums.top], scale, row.bias));
    const double nll = below == 0 ? top : below + top;
    const double lse = scale * sums.m + top;
    const double q_t = job_.on + job_.off, q = job_.on + V_ * job_.off;
    const double more = z_loss != 0 ? 2 * z_loss * lse : 0;
    if (std::fabs(more) > kMostZLoss) return false;
    if (job_.loss) {
      // A class of weight 0 costs nothing, at -inf either; only a NaN comes through.
      double loss = row.w == 0 ? lse : nll;
      if (smooth) loss = (job_.on == 0 ? 0 : job_.on * nll) + job_.off * spread(sums, top);
      if (z_loss != 0) loss += q * z_loss * lse * lse;
      const double scaled = row.r * row.w * loss;
      // log1p(x) is x long before x is subnormal.
      const bool tiny = loss < 0x1p-900 && loss == top && row.w != 0;
      *job_.loss_of(row.i) = tiny ? row.r * row.w * u_mass / e_t : scaled;
    }
    const double coefficient = row.u * row.w * scale;
    const double others = smooth ? (V_ - 1) * job_.off : 0;  // the q beside the target's
    // (The scale before the shares: a share alone may be subnormal.)
    const double share = coefficient / s;
    double value = -q_t * u_mass * share;
    if (smooth || z_loss != 0) value += e_t * share * (others + more * q);
    row.all = all;
    row.coefficient = coefficient * (q + q * more);
    row.offset = coefficient * job_.off;
    row.value = value;
    return true;
  }

  // sum_j (lse - z_j)
  double spread(const RowSums<T>& sums, double top) const {
    double below = 0;
    for (int64_t b = 0; b < n_blocks_; b++)
      below += size(b) * (sums.m - blocks_[b].origin) - blocks_[b].sum;
    return V_ * top + job_.logit_scale * below;
  }

  void stats(const State& row, const RowSums<T>& sums, const Type* z) const {
    const double scale = job_.logit_scale, s = row.all.hi, kNaN = __builtin_nan("");
    const bool none = !(s - s == 0);  // NaN, an infinite logit or nothing but -inf
    double below = 0;                 // sum_j e_j (m - z_j)
    int64_t above = 0;
    for (int64_t b = 0; b < n_blocks_; b++) {
      const Block<T>& block = blocks_[b];
      const double mass = block.mass.value() + block.excluded_e;
      if (block.factor != 0)
        below += block.lift * block.factor * (block.sum + (sums.m - block.max) * mass);
      above += block.above;
    }
    job_.logsumexp[row.i] = none ? kNaN : scale * row.m + row.log_all;
    job_.entropy[row.i] = none ? kNaN : row.log_all + scale * below / s;
    int64_t at = -1;
    if (!none) {
      const int64_t begin = sums.top * kBlock, n = size(sums.top);
      at = begin + first_equal(widened(z + begin, n), n, static_cast<T>(row.m));
    }
    job_.argmax[row.i] = at;
    if (job_.target_logprob)
      job_.target_logprob[row.i] =
          none || row.t < 0 ? kNaN : -(scale * (row.m - row.z_t) + row.log_all);
    if (job_.target_rank) job_.target_rank[row.i] = none || row.t < 0 ? -1 : above;
  }

  void write_logs(const State& row, const Type* z, Type* out, int64_t n) const {
    constexpr int L = Lanes<T>::n;
    const auto m = splat(static_cast<T>(row.m)), tau = splat(static_cast<T>(job_.logit_scale));
    const auto rest = splat(static_cast<T>(row.log_all));
    int64_t j = 0;
    for (; j + L <= n; j += L) S::store(out + j, tau * (S::load(z + j) - m) - rest);
    if (const int left = static_cast<int>(n - j))
      store_part<S>(out + j, left, tau * (load_part<S>(z + j, left, T(0)) - m) - rest);
  }

  const RowJob& job_;
  const int64_t V_, n_blocks_;
  const bool leaves_max_, streams_;
  bool keep_ = false;
  Block<T>* blocks_ = nullptr;
  T *e_ = nullptr, *wide_ = nullptr;
};

}  // namespace
}  // namespace CROSSENT_ISA
}  // namespace crossent
