// One row a lane: short rows, and a class axis that is not the last one.
//
// Design:
//   a. A tile holds L rows as (V, L) floats in scratch: transposed in registers where the classes
//   are
//      contiguous, loaded as they lie where neighbouring rows are. Every step of rows.cpp then is
//      one vector instruction for L rows, the logarithm too, and no sum runs across lanes.
//   b. Same numbers as rows.cpp: integer references, the target left out of the mass, the same K.
//   Only
//      for float (and the 16-bit dtypes, computed in it); sums and row numbers are double.
//   c. Which rows come here depends on shapes and strides alone, so a row's bits do too.
#include <cmath>

#include "exp.h"
#include "log.h"
#include "rows.h"
#include "storage.h"
#include "transpose.h"

namespace crossent {
namespace CROSSENT_ISA {

void serve_rows(const RowJob& job, int64_t begin, int64_t end);  // rows.cpp

namespace {

constexpr int L = Lanes<float>::n;
typedef Lanes<float>::Bits Index;
constexpr float kInfinity = __builtin_inff();

// L doubles: what rows.cpp calls the row's numbers.
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

template <class S>
class Tiles {
  using Type = typename S::Type;

 public:
  explicit Tiles(const RowJob& job)
      : job_(job),
        V_(job.logits.classes),
        uniform_(!job.row_weight && !job.class_weight && !job.upstream) {
    const double r = 1 / job.divisor;
    for (int k = 0; k < L; k++) {
      target_[k] = 0;
      kept_[k] = ~0u;
      scale_[k] = r;
      upstream_[k] = r * job.upstream_all;
      uniform_fits_ = bias_for(scale_[k], upstream_[k], &bias_[k]);
      if (!uniform_) bias_[k] = 0;  // a lane past the last row: anything harmless
    }
  }

  bool prepare() {
    e_ = static_cast<float*>(scratch(5, V_ * kBytes));
    return e_ != nullptr;
  }

  // How many rows from i on one tile may take: those of one outer index where lanes are contiguous.
  int64_t room(int64_t i) const {
    const int64_t inner = job_.logits.inner, left = inner - i % inner;
    const bool any =
        job_.logits.contiguous_rows() && (!job_.out.data || job_.out.contiguous_rows());
    return any || left > L ? L : left;
  }

  // Rows [i, i + n), n <= room(i). False, and nothing is done: not for lanes.
  bool run(int64_t i, int n) {
    if (!numbers(i, n)) return false;
    if (job_.logits.contiguous_rows()) {
      read_rows(i, n);
    } else if (contiguous_lanes(job_.logits)) {
      read_columns(i, n);
    } else {
      read_each(i, n);
    }
    exponentials();
    if (job_.task == Task::kLoss) {
      if (!losses(i, n)) return false;
    } else {
      probabilities();
    }
    if (!job_.out.data) return true;
    if (job_.out.contiguous_rows()) {
      write_rows(i, n);
    } else if (contiguous_lanes(job_.out)) {
      write_columns(i, n);
    } else {
      write_each(i, n);
    }
    return true;
  }

 private:
  // Scales, targets and biases of the rows; those of lanes past n and of dropped rows are harmless.
  bool numbers(int64_t i, int n) {
    const bool index = job_.kind == Target::kIndex;
    all_kept_ = true;
    if (uniform_) {
      for (int k = 0; index && k < n; k++) {
        const int64_t t = job_.target[i + k];
        const bool kept = t != job_.skip;
        target_[k] = kept ? static_cast<uint32_t>(t) : 0;
        kept_[k] = kept ? ~0u : 0;
        all_kept_ &= kept;
      }
      return uniform_fits_;
    }
    for (int k = 0; k < n; k++) {
      const int64_t row = i + k;
      const bool kept = !job_.dropped(row);
      const int64_t t = index && kept ? job_.target[row] : 0;
      const double w = job_.class_weight && index ? job_.class_weight[t] : 1.0;
      target_[k] = static_cast<uint32_t>(t);
      kept_[k] = kept ? ~0u : 0;
      all_kept_ &= kept;
      scale_[k] = kept ? job_.row_scale(row) * w : 0;
      upstream_[k] = kept ? job_.row_scale(row) * job_.row_upstream(row) * w : 0;
      if (w == 0 || !bias_for(scale_[k], upstream_[k], &bias_[k])) return false;
    }
    return true;
  }

  // K of rows.cpp: 60 above the scale's exponent; false where the scale leaves no room.
  static bool bias_for(double r, double u, float* bias) {
    const int a = exponent(r), b = u == 0 ? a : exponent(u);
    const int k = (a > b ? a : b) + 60;
    *bias = static_cast<float>(k > -60 ? k : -60);
    return a <= 58 && b <= 58 && a - b < 20;
  }

  void read_rows(int64_t i, int n) {
    const Type* rows[L];
    for (int k = 0; k < L; k++)
      rows[k] = reinterpret_cast<const Type*>(job_.logits.row(i + (k < n ? k : 0)));
    int64_t j = 0;
    for (; j + L <= V_; j += L) read_square(rows, j, L);
    if (j < V_) read_square(rows, j, static_cast<int>(V_ - j));
  }

  __attribute__((always_inline)) void read_square(const Type* const (&rows)[L], int64_t j,
                                                  int count) {
    F x[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; k++)
      x[k] = count == L ? S::load(rows[k] + j) : load_part<S>(rows[k] + j, count, 0.0f);
    transpose(x);
#pragma GCC unroll 16
    for (int k = 0; k < L; k++)
      if (k < count) store(e_ + (j + k) * L, x[k]);
  }

  static bool contiguous_lanes(const View& view) {
    return view.inner_stride == int64_t{sizeof(Type)};
  }

  void read_each(int64_t i, int n) {
    alignas(kBytes) Type part[L] = {};
    const char* rows[L];
    for (int k = 0; k < n; k++) rows[k] = job_.logits.row(i + k);
    for (int64_t j = 0; j < V_; j++) {
      for (int k = 0; k < n; k++)
        part[k] = *reinterpret_cast<const Type*>(rows[k] + j * job_.logits.class_stride);
      store(e_ + j * L, S::load(part));
    }
  }

  void write_each(int64_t i, int n) const {
    alignas(kBytes) Type part[L];
    char* rows[L];
    for (int k = 0; k < n; k++) rows[k] = job_.out.row(i + k);
    for (int64_t j = 0; j < V_; j++) {
      S::store(part, load(e_ + j * L));
      for (int k = 0; k < n; k++)
        *reinterpret_cast<Type*>(rows[k] + j * job_.out.class_stride) = part[k];
    }
  }

  void read_columns(int64_t i, int n) {
    const char* at = job_.logits.row(i);
    for (int64_t j = 0; j < V_; j++, at += job_.logits.class_stride) {
      const auto* row = reinterpret_cast<const Type*>(at);
      store(e_ + j * L, n == L ? S::load(row) : load_part<S>(row, n, 0.0f));
    }
  }

  void write_rows(int64_t i, int n) const {
    Type* rows[L];
    for (int k = 0; k < n; k++) rows[k] = reinterpret_cast<Type*>(job_.out.row(i + k));
    int64_t j = 0;
    for (; j + L <= V_; j += L) write_square(rows, j, L, n);
    if (j < V_) write_square(rows, j, static_cast<int>(V_ - j), n);
  }

  __attribute__((always_inline)) void write_square(Type* const (&rows)[L], int64_t j, int count,
                                                   int n) const {
    F x[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) x[k] = k < count ? load(e_ + (j + k) * L) : F{};
    transpose(x);
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) {
      if (k >= n) break;
      count == L ? S::store(rows[k] + j, x[k]) : store_part<S>(rows[k] + j, count, x[k]);
    }
  }

  void write_columns(int64_t i, int n) const {
    char* at = job_.out.row(i);
    for (int64_t j = 0; j < V_; j++, at += job_.out.class_stride) {
      auto* row = reinterpret_cast<Type*>(at);
      const F x = load(e_ + j * L);
      n == L ? S::store(row, x) : store_part<S>(row, n, x);
    }
  }

  // The tile becomes e = exp(tau (z - origin)) 2^(K - reference), but for log-softmax; found are
  // the mass beside the entry left out (the target; for log-softmax the first maximum), that
  // entry's e and z, and sum z - origin.
  void exponentials() {
    F m = splat(-kInfinity);
    Index at = {};
    if (job_.task == Task::kLogSoftmax) {
      for (int64_t j = 0; j < V_; j++) {
        const F x = load(e_ + j * L);
        at = (Index)select(x > m, (F)(Index{} + static_cast<uint32_t>(j)), (F)at);
        m = max(x, m);
      }
      __builtin_memcpy(target_, &at, sizeof at);
    } else {
      F m2 = m;
      int64_t j = 0;
      for (; j + 1 < V_; j += 2) {
        m = max(load(e_ + j * L), m);
        m2 = max(load(e_ + (j + 1) * L), m2);
      }
      if (j < V_) m = max(load(e_ + j * L), m);
      m = max(m2, m);
    }
    const bool scaled = job_.logit_scale != 1, smooth = job_.off != 0;
    if (scaled) {
      smooth ? exponentials<true, true>(m) : exponentials<true, false>(m);
    } else {
      smooth ? exponentials<false, true>(m) : exponentials<false, false>(m);
    }
  }

  template <bool kScaled, bool kSmooth>
  void exponentials(F m) {
    const F tau = splat(static_cast<float>(job_.logit_scale));
    const F top = kScaled ? tau * m : m, magnitude = select(top < 0, -top, top);
    const auto plain = (magnitude < 264.0f) | (top == -kInfinity);
    const F origin = select(plain, F{}, m);
    const F rounder = splat(0x1.8p23f);
    const F finite_top = select(magnitude < 264.0f, top, F{});
    const F reference = fma(finite_top, splat(static_cast<float>(kLog2E)), rounder) - rounder;
    const Exp<float> exp(load(bias_) - reference);
    // Class 2^32 - 1 leaves nothing out.
    Index target;
    __builtin_memcpy(&target, target_, sizeof target);
    if (job_.task == Task::kSoftmax) target = Index{} + ~0u;
    const bool keep_z = job_.task == Task::kLogSoftmax;

    Wide mass = all(0), mass2 = mass, sum = mass;
    F e_out = {}, z_out = {};
    const auto one = [&](int64_t j, Wide& to) __attribute__((always_inline)) {
      const F x = load(e_ + j * L), d = x - origin, h = kScaled ? tau * d : d;
      const F e = exp.template operator()<kScaled>(h, kScaled ? fma(tau, d, -h) : h);
      const auto out = target == static_cast<uint32_t>(j);
      if (!keep_z) store(e_ + j * L, e);
      e_out = select(out, e, e_out);
      z_out = select(out, x, z_out);
      to = to + widen(select(out, F{}, e));
      if (kSmooth) sum = sum + widen(d);
    };
    int64_t j = 0;
    for (; j + 1 < V_; j += 2) {
      one(j, mass);
      one(j + 1, mass2);
    }
    if (j < V_) one(j, mass);
    m_ = m;
    z_out_ = z_out;
    origin_ = widen(origin);
    sum_ = sum;
    e_out_ = widen(e_out);
    beside_ = mass + mass2;
    const F d = m - origin, h = kScaled ? tau * d : d;
    top_e_ = widen(exp.template operator()<kScaled>(h, kScaled ? fma(tau, d, -h) : h));
    const Wide nan = all(__builtin_nan("")), wide_m = widen(m);
    beside_.low = select(wide_m.low == -kInfinity, nan.low, beside_.low);
    beside_.high = select(wide_m.high == -kInfinity, nan.high, beside_.high);
  }

  // e times coefficient / S - offset, `value` at the target, 0 in dropped rows.
  template <bool kSmooth, bool kTarget>
  void finish(Wide quotient, Wide offset, Wide value) {
    const F high = narrow(quotient);
    F low = narrow(quotient - widen(high));
    low = select((low - low) == 0, low, F{});
    const F minus = narrow(offset), at_target = narrow(value);
    Index target, kept;
    __builtin_memcpy(&target, target_, sizeof target);
    __builtin_memcpy(&kept, kept_, sizeof kept);
    for (int64_t j = 0; j < V_; j++) {
      const F e = load(e_ + j * L);
      F g = fma(e, high, kSmooth ? fma(e, low, -minus) : e * low);
      if (kTarget) g = select(target == static_cast<uint32_t>(j), at_target, g);
      store(e_ + j * L, (F)((Index)g & kept));
    }
  }

  bool losses(int64_t i, int n) {
    const double tau = job_.logit_scale, c = job_.z_loss, on = job_.on, off = job_.off;
    const bool smooth = off != 0;
    const Wide m = widen(m_), z_t = widen(z_out_), s = beside_ + e_out_;
    // lse - z at the maximum: log1p(U / e_t) where that is the target, else log(S / e_m).
    const auto top_of = [](D u, D e_t, D s_, D e_m, D m_, D z) {
      const auto right = m_ == z;
      return log1p(select(right, u, s_ - e_m) / select(right, e_t, e_m));
    };
    const Wide top = {top_of(beside_.low, e_out_.low, s.low, top_e_.low, m.low, z_t.low),
                      top_of(beside_.high, e_out_.high, s.high, top_e_.high, m.high, z_t.high)};
    const auto below_of = [&](D a, D b) { return select(a == b, D{}, tau * (a - b)); };
    const Wide nll = each(m, z_t, below_of) + top;
    const Wide lse = all(tau) * m + top;
    const double q = on + V_ * off;
    const Wide more = all(2 * c) * lse;
    if (c != 0 && !within(more, kMostZLoss, n)) return false;
    if (job_.loss) {
      Wide loss = nll;
      if (smooth) {
        const Wide spread = all(static_cast<double>(V_)) * top +
                            all(tau) * (all(static_cast<double>(V_)) * (m - origin_) - sum_);
        loss = all(off) * spread;
        if (on != 0) loss = loss + all(on) * nll;
      }
      if (c != 0) loss = loss + all(q * c) * lse * lse;
      loss = load_wide(scale_) * loss;
      if (n == L && all_kept_) {
        store_wide(job_.loss + i, loss);
      } else {
        alignas(kBytes) double out[L];
        store_wide(out, loss);
        for (int k = 0; k < n; k++) job_.loss[i + k] = kept_[k] ? out[k] : 0;
      }
    }
    if (!job_.out.data) return true;
    const Wide coefficient = load_wide(upstream_) * all(tau);
    const Wide share = all(1) / s;
    Wide at_target = all(-(on + off)) * beside_ * share, factor = all(q);
    if (smooth || c != 0) {
      Wide rest = all(smooth ? (V_ - 1) * off : 0);
      if (c != 0) rest = rest + more * all(q), factor = factor + more * all(q);
      at_target = at_target + e_out_ * share * rest;
    }
    const Wide quotient = coefficient * factor * share;
    if (smooth) {
      finish<true, true>(quotient, coefficient * all(off), coefficient * at_target);
    } else {
      finish<false, true>(quotient, quotient, coefficient * at_target);
    }
    return true;
  }

  // No kept row's number beyond the limit?
  bool within(Wide x, double limit, int n) const {
    alignas(kBytes) double numbers[L];
    store_wide(numbers, x);
    bool good = true;
    for (int k = 0; k < n; k++) good &= !kept_[k] || !(std::fabs(numbers[k]) > limit);
    return good;
  }

  void probabilities() {
    if (job_.task == Task::kSoftmax) {
      const Wide quotient = all(1) / beside_;
      finish<false, false>(quotient, quotient, quotient);
      return;
    }
    const F tau = splat(static_cast<float>(job_.logit_scale));
    const F rest = narrow(each(beside_, top_e_, [](D u, D e) { return log1p(u / e); }));
    for (int64_t j = 0; j < V_; j++) {
      store(e_ + j * L, tau * (load(e_ + j * L) - m_) - rest);
    }
  }

  const RowJob& job_;
  const int64_t V_;
  const bool uniform_;  // one scale for all rows
  bool uniform_fits_ = true, all_kept_ = true;
  float* e_ = nullptr;
  alignas(kBytes) uint32_t target_[L], kept_[L];
  alignas(kBytes) float bias_[L];
  alignas(kBytes) double scale_[L], upstream_[L];
  F m_, z_out_;
  Wide origin_, sum_, e_out_, beside_, top_e_;
};

template <class S>
void serve(const RowJob& job, int64_t begin, int64_t end) {
  Tiles<S> tiles(job);
  if (!tiles.prepare()) return report_out_of_memory(job);
  for (int64_t i = begin; i < end;) {
    int64_t n = tiles.room(i);
    if (n > end - i) n = end - i;
    if (!tiles.run(i, static_cast<int>(n)))
      // Row by row, so that no row's bits depend on its neighbours.
      for (int64_t k = i; k < i + n; k++)
        if (!tiles.run(k, 1)) serve_rows(job, k, k + 1);
    i += n;
  }
}

}  // namespace

void serve_lanes(const RowJob& job, int64_t begin, int64_t end) {
  switch (job.logits.dtype) {
    case Dtype::kFloat16:
      return serve<Stored<Dtype::kFloat16>>(job, begin, end);
    case Dtype::kBFloat16:
      return serve<Stored<Dtype::kBFloat16>>(job, begin, end);
    case Dtype::kFloat32:
      return serve<Stored<Dtype::kFloat32>>(job, begin, end);
    case Dtype::kFloat64:
      return serve_rows(job, begin, end);
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
