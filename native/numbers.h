// The numbers of L rows at a time, one row a lane of double: from what reading the rows found to
// their losses and to what turns e into the gradient. For float compute and index targets, as
// lanes.cpp and short.cpp use it; rows.cpp, c to e, says why it is done so.
#pragma once

#include <cmath>

#include "exp.h"
#include "log.h"
#include "rows.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

// L doubles.
struct Wide {
  D low, high;
};
CROSSENT_INLINE Wide widen(F x) { return {low(x), high(x)}; }
CROSSENT_INLINE F narrow(Wide x) { return join(x.low, x.high); }
template <class Op>
CROSSENT_INLINE Wide each(Wide a, const Op& op) {
  return {op(a.low), op(a.high)};
}
template <class Op>
CROSSENT_INLINE Wide each(Wide a, Wide b, const Op& op) {
  return {op(a.low, b.low), op(a.high, b.high)};
}
CROSSENT_INLINE Wide operator+(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
CROSSENT_INLINE Wide operator-(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }
CROSSENT_INLINE Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
CROSSENT_INLINE Wide operator/(Wide a, Wide b) { return {a.low / b.low, a.high / b.high}; }
CROSSENT_INLINE Wide all(double x) { return {splat(x), splat(x)}; }
CROSSENT_INLINE Wide load_wide(const double* p) { return {load(p), load(p + kHalf)}; }
CROSSENT_INLINE void store_wide(double* p, Wide x) {
  store(p, x.low);
  store(p + kHalf, x.high);
}

typedef Lanes<float>::Bits Index;

// L integers of 64 bits as their halves.
struct Words {
  Index low, high;
};
CROSSENT_INLINE Words words(const int64_t* p) {
  const auto* at = reinterpret_cast<const float*>(p);
  const auto a = (Index)load(at), b = (Index)load(at + Lanes<float>::n);
#if defined(__AVX512F__)
#define CROSSENT_EVERY_OTHER(k)                                                                  \
  k, k + 2, k + 4, k + 6, k + 8, k + 10, k + 12, k + 14, k + 16, k + 18, k + 20, k + 22, k + 24, \
      k + 26, k + 28, k + 30
#elif defined(__AVX2__)
#define CROSSENT_EVERY_OTHER(k) k, k + 2, k + 4, k + 6, k + 8, k + 10, k + 12, k + 14
#else
#define CROSSENT_EVERY_OTHER(k) k, k + 2, k + 4, k + 6
#endif
  return {__builtin_shufflevector(a, b, CROSSENT_EVERY_OTHER(0)),
          __builtin_shufflevector(a, b, CROSSENT_EVERY_OTHER(1))};
#undef CROSSENT_EVERY_OTHER
}
CROSSENT_INLINE Words words_of(int64_t x) {
  const auto bits = static_cast<uint64_t>(x);
  return {Index{} + static_cast<uint32_t>(bits), Index{} + static_cast<uint32_t>(bits >> 32)};
}

// What is known of L rows before they are read.
struct Looked {
  Index target, kept;  // kept: all bits or none
  F bias;              // K of rows.cpp
  Wide scale, upstream;
  bool all_kept, fits;  // fits: no scale is 0 or leaves the bias no room
};

// What reading them found. The entry left out of the mass is the target; for log-softmax the first
// maximum.
struct Found {
  F m, z_out;
  Wide beside, e_out, top_e;  // mass without the entry left out; e of it; e of the maximum
  Wide sum;                   // of z, where smoothing wants it

  // A row of -inf alone is NaN.
  __attribute__((always_inline)) void spoil_empty() {
    const D nan = splat(__builtin_nan(""));
    const Wide wide_m = widen(m);
    const double nothing = -__builtin_huge_val();
    beside.low = select(wide_m.low == nothing, nan, beside.low);
    beside.high = select(wide_m.high == nothing, nan, beside.high);
  }
};

// The gradient is e * quotient - offset, but `value` at the target.
struct Factors {
  Wide quotient, offset, value;
};

class Numbers {
 public:
  static constexpr int L = Lanes<float>::n;

  explicit Numbers(const RowJob& job)
      : job_(job),
        uniform_(!job.row_weight && !job.class_weight && !job.upstream),
        index_(job.kind == Target::kIndex),
        steep_(std::fmax(job.logit_scale, 1.0)) {
    const double r = 1 / job.divisor, u = r * job.upstream_all;
    float bias = 0;
    same_.fits = bias_for(r, u * steep_, &bias);
    same_.target = Index{};
    same_.kept = ~Index{};
    same_.bias = splat(bias);
    same_.scale = all(r);
    same_.upstream = all(u);
    same_.all_kept = true;
  }

  // What is the same for all rows, where they have no scales of their own; for look_up to start
  // from, once.
  const Looked& any_rows() const { return same_; }

  // Rows [i, i + n), n <= L; what lanes past n hold is harmless.
  __attribute__((always_inline)) void look_up(int64_t i, int n, Looked* rows) const {
    if (uniform_ && !index_) return;
    if (uniform_ && n == L) {
      // As halves: comparing 64 bits takes two vectors, and without a sign several instructions.
      const Words t = words(job_.target + i), skip = words_of(job_.skip);
      const Index skipped = (t.low == skip.low) & (t.high == skip.high);
      const Index inside =
          (t.high == Index{}) & (t.low < Index{} + static_cast<uint32_t>(job_.logits.classes));
      const Index kept = inside & ~skipped;
      if (any_set(~inside & ~skipped)) report_bad_target(job_);
      rows->target = t.low & kept;
      rows->kept = kept;
      rows->all_kept = all_set(kept);
      return;
    }
    look_each_up(i, n, rows);
  }

  // Writes the losses of rows [i, i + n). False, and nothing is written: a z-loss too large.
  __attribute__((always_inline)) bool losses(const Looked& rows, const Found& found, int64_t i,
                                             int n, Factors* factors) const {
    const double tau = job_.logit_scale, c = job_.z_loss, on = job_.on, off = job_.off;
    const double V = static_cast<double>(job_.logits.classes);
    const bool smooth = off != 0;
    const Wide m = widen(found.m), z_t = widen(found.z_out);
    const Wide &beside = found.beside, &e_t = found.e_out, s = beside + e_t;
    // lse - z at the maximum: log1p(U / e_t) where that is the target, else log(S / e_m). One
    // division serves this and the share 1 / S.
    struct Half {
      D top, share;
    };
    const auto half = [](D u, D e, D sum, D e_m, D max, D z) __attribute__((always_inline)) {
      const auto right = max == z;
      const D below = select(right, e, e_m), inverse = 1.0 / (below * sum);
      return Half{log1p(select(right, u, sum - e_m) * (sum * inverse)), below * inverse};
    };
    const Half low = half(beside.low, e_t.low, s.low, found.top_e.low, m.low, z_t.low);
    const Half high = half(beside.high, e_t.high, s.high, found.top_e.high, m.high, z_t.high);
    const Wide top = {low.top, high.top}, share = {low.share, high.share};
    const auto below_of = [&](D a, D b) { return select(a == b, D{}, tau * (a - b)); };
    const Wide nll = each(m, z_t, below_of) + top;
    const double q = on + V * off;
    Wide more = all(0);
    if (c != 0) {
      more = all(2 * c) * (all(tau) * m + top);
      if (!within(more, rows.kept, n)) return false;
    }
    if (job_.loss) {
      Wide loss = nll;
      if (smooth) {
        const Wide spread = all(V) * top + all(tau) * (all(V) * m - found.sum);
        loss = all(off) * spread;
        if (on != 0) loss = loss + all(on) * nll;
      }
      if (c != 0) {
        const Wide lse = all(tau) * m + top;
        loss = loss + all(q * c) * lse * lse;
      }
      loss = rows.scale * loss;
      if (n == L && rows.all_kept) {
        store_wide(job_.loss_of(i), loss);
      } else {
        alignas(kBytes) double out[L];
        store_wide(out, loss);
        for (int k = 0; k < n; k++) *job_.loss_of(i + k) = rows.kept[k] ? out[k] : 0;
      }
    }
    if (!job_.out.data) return true;
    const Wide coefficient = rows.upstream * all(tau);
    Wide at_target = all(-(on + off)) * beside * share, factor = all(q);
    if (smooth || c != 0) {
      Wide rest = all(smooth ? (V - 1) * off : 0);
      if (c != 0) rest = rest + more * all(q), factor = factor + more * all(q);
      at_target = at_target + e_t * share * rest;
    }
    factors->quotient = coefficient * factor * share;
    factors->offset = coefficient * all(off);
    factors->value = coefficient * at_target;
    return true;
  }

 private:
  void look_each_up(int64_t i, int n, Looked* rows) const {
    alignas(kBytes) uint32_t target[L] = {}, kept[L];
    alignas(kBytes) float bias[L];
    alignas(kBytes) double scale[L], upstream[L];
    store(bias, same_.bias);
    store_wide(scale, same_.scale);
    store_wide(upstream, same_.upstream);
    for (int k = 0; k < L; k++) kept[k] = ~0u;
    rows->all_kept = true;
    for (int k = 0; k < n; k++) {
      const int64_t row = i + k;
      int64_t t;
      const bool keep = job_.kept(row, &t);
      if (!keep) t = 0;
      const double w = job_.class_weight && index_ ? job_.class_weight[t] : 1.0;
      target[k] = static_cast<uint32_t>(t);
      kept[k] = keep ? ~0u : 0;
      rows->all_kept &= keep;
      if (uniform_) continue;
      scale[k] = keep ? job_.row_scale(row) * w : 0;
      upstream[k] = keep ? job_.row_scale(row) * job_.row_upstream(row) * w : 0;
      if (k == 0) rows->fits = true;
      rows->fits &= bias_for(scale[k], upstream[k] * steep_, &bias[k]) && w != 0;
    }
    __builtin_memcpy(&rows->target, target, sizeof target);
    __builtin_memcpy(&rows->kept, kept, sizeof kept);
    if (uniform_) return;
    rows->bias = load(bias);
    rows->scale = load_wide(scale);
    rows->upstream = load_wide(upstream);
  }

  // 60 above the scale's exponent; false where the scale leaves no room.
  static bool bias_for(double r, double u, float* bias) {
    const int a = exponent(r), b = u == 0 ? a : exponent(u);
    const int k = (a > b ? a : b) + 60;
    *bias = static_cast<float>(k > -60 ? k : -60);
    return a <= 58 && b <= 58 && a - b < 20;
  }

  // No kept row's number beyond what a z-loss may be?
  static bool within(Wide x, Index kept, int n) {
    alignas(kBytes) double numbers[L];
    store_wide(numbers, x);
    bool good = true;
    for (int k = 0; k < n; k++) good &= !kept[k] || !(std::fabs(numbers[k]) > kMostZLoss);
    return good;
  }

  const RowJob& job_;
  const bool uniform_, index_;  // uniform: one scale for all rows
  const double steep_;          // of the logits' scale, what could lift exp's floor into sight
  Looked same_;
};

}  // namespace
}  // namespace CROSSENT_ISA
}  // namespace crossent
