// The general row kernel: any target, any option, in lanes of double whatever the dtype.
//
// Design:
//   a. The logits v and the target row q are laid out in double scratch rows first; everything
//   after
//      that knows neither dtypes nor strides nor kinds of target.
//   b. d = scale (v - m) is kept as a double word (its rounding error goes into exp), so that e_j =
//      exp(d_j) is as good as its argument; e at the maximum is exactly 1 and S = 1 + U.
//   c. With A = p_j (Q - q_j) and B = q_j (1 - p_j) the gradient is A - B (+ C for the z-loss). The
//      complements are differences where p_j, |q_j| are at most half of their sum; at the maximum
//      of p and of |q| they are sums of the others, so nothing cancels at a confident row.
//   d. Sums are compensated. With float32 logits all this is far more than enough; with float64 it
//   is
//      what holds the bounds.
#include <cmath>

#include "doubles.h"
#include "exp.h"
#include "rows.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

constexpr int L = Lanes<double>::n;
constexpr double kInfinity = __builtin_huge_val(), kNaN = __builtin_nan("");

// tanh(x), and 1 - tanh(x)^2 = 4 E / (1 + E)^2 with E = exp(-2 |x|). Below 1/4 the Maclaurin
// series, whose next term is under 2^-58 there.
void tanh_row(const double* x, double* t, double* slope, int64_t n) {
  static constexpr double c[] = {
      -0x1.5555555555555p-2,  0x1.1111111111111p-3, -0x1.ba1ba1ba1ba1cp-5,  0x1.664f4882c10fap-6,
      -0x1.226e355e6c23dp-7,  0x1.d6d3d0e157de0p-9, -0x1.7da36452b75e3p-10, 0x1.3558248036744p-11,
      -0x1.f57d7734d1664p-13, 0x1.967e18afcafadp-14};
  const Exp<double> exp(64);  // the bias keeps the floor of exp (exp.h, c) out of sight
  for (int64_t j = 0; j < n; j += L) {
    const D v = load(x + j), a = select(v < 0, -v, v), y = v * v;
    const D e = exp.one(-2 * a) * 0x1p-64;
    D series = splat(c[9]);
    for (int k = 8; k >= 0; k--) series = fma(series, y, splat(c[k]));
    const D large = (1 - e) / (1 + e);
    store(t + j, select(a < 0.25, fma(v * y, series, v), select(v < 0, -large, large)));
    store(slope + j, 4 * e / ((1 + e) * (1 + e)));
  }
}

int64_t index_of(const double* x, int64_t n, double value) {
  for (int64_t j = 0; j < n; j++)
    if (x[j] == value) return j;
  return 0;
}

// The scratch rows, V padded to whole vectors.
struct Rows {
  double *z, *low, *e, *q, *slope, *bend, *y;
};

class General {
 public:
  explicit General(const RowJob& job)
      : job_(job), V_(job.logits.classes), padded_((V_ + L - 1) / L * L) {}

  bool prepare() {
    const bool capped = job_.softcap > 0, hvp = job_.task == Task::kHvp;
    const int rows = 4 + (capped ? 2 : 0) + (hvp ? 1 : 0);
    double* at = static_cast<double*>(scratch(4, rows * padded_ * int64_t{sizeof(double)}));
    if (!at) return false;
    rows_ = {at, at + padded_, at + 2 * padded_, at + 3 * padded_, nullptr, nullptr, nullptr};
    at += 4 * padded_;
    if (capped) rows_.slope = at, rows_.bend = at + padded_, at += 2 * padded_;
    if (hvp) rows_.y = at;
    return true;
  }

  void run(int64_t i) {
    int64_t t;
    if (!job_.kept(i, &t)) return leave_out(i);
    if (job_.kind != Target::kIndex) t = -1;
    read_row(job_.logits, i, rows_.z);
    fill(rows_.z, -kInfinity);
    if (job_.task == Task::kStats) count(i, t);
    if (!cap()) return;
    exponentials();
    if (job_.task == Task::kStats) return stats(i, t);
    if (stops()) return;
    target_row(i, t);
    sums();
    if (stops()) return;
    if (job_.loss) *job_.loss_of(i) = job_.row_scale(i) * loss();
    if (!job_.out.data) return;
    const double u = job_.row_scale(i) * job_.row_upstream(i);
    if (job_.task == Task::kHvp) {
      hvp(i, u);
    } else {
      gradient();
      for (int64_t j = 0; j < padded_; j += L)
        store(rows_.z + j, load(rows_.low + j) * (u * job_.logit_scale) * slope(j));
    }
    write_row(job_.out, i, rows_.z);
  }

 private:
  // A row so long that nobody would wait for its end.
  bool stops() const { return V_ > kLong && given_up(); }
  void fill(double* row, double value) const {
    for (int64_t j = V_; j < padded_; j++) row[j] = value;
  }
  D slope(int64_t j) const { return rows_.slope ? load(rows_.slope + j) : splat(1.0); }

  void leave_out(int64_t i) const {
    drop(job_, i);
    if (!job_.out.data) return;
    for (int64_t j = 0; j < V_; j++) rows_.z[j] = 0;
    write_row(job_.out, i, rows_.z);
  }

  // argmax and rank, of the logits as they came: the scale and the cap keep their order.
  void count(int64_t i, int64_t t) {
    double m = -kInfinity;
    int64_t at = 0, above = 0;
    bool nan = false;
    const double z_t = t >= 0 ? rows_.z[t] : 0;
    for (int64_t j = 0; j < V_; j++) {
      const double x = rows_.z[j];
      nan |= x != x;
      if (x > m) m = x, at = j;
      above += x > z_t;
    }
    const bool none = nan || m == -kInfinity || m == kInfinity;
    job_.argmax[i] = none ? -1 : at;
    if (job_.target_rank) job_.target_rank[i] = none || t < 0 ? -1 : above;
  }

  // z = cap * tanh(scale v / cap); slope is dz/dv / scale and bend d2z/dv2 / scale^2.
  // False: stopped in the middle.
  bool cap() {
    scale_ = job_.logit_scale;
    if (job_.softcap == 0) return true;
    for (int64_t j = 0; j < padded_; j += kPiece) {
      cap(j, j + kPiece < padded_ ? j + kPiece : padded_);
      if (stops()) return false;
    }
    scale_ = 1;
    return true;
  }

  void cap(int64_t begin, int64_t end) {
    const double cap = job_.softcap;
    // tanh and its slope are flat long before kFlat; past it the product could overflow and pass
    // for an infinite logit.
    const D flat = splat(kFlat);
    for (int64_t j = begin; j < end; j += L) {
      const D x = load(rows_.z + j) * scale_ / cap;
      store(rows_.low + j, select(x > flat, flat, select(x < -flat, -flat, x)));
    }
    tanh_row(rows_.low + begin, rows_.e + begin, rows_.slope + begin, end - begin);
    for (int64_t j = begin; j < end; j += L) {
      const D v = load(rows_.z + j), t = load(rows_.e + j), s = load(rows_.slope + j);
      const auto infinite = (v - v) != 0;  // an infinite v stays infinite, NaN stays NaN
      store(rows_.z + j, select(infinite, v, cap * t));
      store(rows_.slope + j, select(infinite, D{}, s));
      store(rows_.bend + j, select(infinite, D{}, -2 * t * s / cap));
    }
  }

  void exponentials() {
    D most = splat(-kInfinity);
    for (int64_t j = 0; j < padded_; j += L) most = max(load(rows_.z + j), most);
    double m = most[0];
    for (int k = 1; k < L; k++) m = most[k] > m ? most[k] : m;
    top_ = index_of(rows_.z, V_, m);
    const Exp<double> exp(kBias);
    const D tau = splat(scale_), origin = splat(m);
    LaneSum beside;
    for (int64_t j = 0; j < padded_; j += L) {
      const D z = load(rows_.z + j), d = z - origin, v = d - z;
      const D error = (z - (d - v)) + (-origin - v);  // TwoSum(z, -m)
      const D h = tau * d;
      const auto finite = (h - h) == 0;
      const D low = select(finite, fma(tau, d, -h) + tau * error, D{});
      D e = exp.one(h, low);
      e = select(h < exp.lowest, D{}, e);  // the floor times a huge h would show in sums
      store(rows_.z + j, h);
      store(rows_.low + j, low);
      store(rows_.e + j, e);
      if (top_ >= j && top_ < j + L) e[top_ - j] = 0;
      beside.add(e);
    }
    const Word u = beside.total();
    // m is not finite, or a NaN is in the row: so is everything.
    const bool good = m - m == 0;
    top_z_ = scale_ * m;
    beside_ = good ? std::ldexp(u.value(), -kBias) : kNaN;
    all_ = 1 + beside_;
    log_all_ = std::log1p(beside_);
    lse_ = top_z_ + log_all_;
  }

  void stats(int64_t i, int64_t t) const {
    job_.logsumexp[i] = lse_;
    if (job_.target_logprob) job_.target_logprob[i] = t < 0 ? kNaN : rows_.z[t] - log_all_;
    LaneSum below;  // sum_j p_j (m - z_j); the terms of p = 0 are 0
    for (int64_t j = 0; j < padded_; j += L) {
      const D e = load(rows_.e + j), h = load(rows_.z + j);
      below.add(select(e == 0, D{}, -h * e));
    }
    job_.entropy[i] = log_all_ + std::ldexp(below.total().value(), -kBias) / all_;
  }

  void target_row(int64_t i, int64_t t) {
    double* q = rows_.q;
    const double on = job_.on, off = job_.off;
    switch (job_.kind) {
      case Target::kDistribution:
        read_row(job_.distribution, i, q);
        for (int64_t j = 0; j < V_; j++) {
          if (job_.round_target) q[j] = static_cast<float>(q[j]);
          q[j] = off == 0 ? on * q[j] : on * q[j] + off;
        }
        break;
      case Target::kIndex:
        for (int64_t j = 0; j < V_; j++) q[j] = off;
        q[t] += on;
        break;
      case Target::kSparse:
        // Repeated ids add before anything is rounded: they may cancel.
        for (int64_t j = 0; j < V_; j++) q[j] = 0;
        for (int64_t k = i * job_.n_ids; k < (i + 1) * job_.n_ids; k++)
          if (job_.target[k] >= 0) q[job_.target[k]] += job_.target_prob[k];
        for (int64_t j = 0; j < V_; j++) q[j] = q[j] * on + off;
        break;
      case Target::kNone:
        for (int64_t j = 0; j < V_; j++) q[j] = 0;
    }
    if (job_.class_weight)
      for (int64_t j = 0; j < V_; j++) q[j] *= job_.class_weight[j];
    fill(q, 0);
  }

  // Q, what of it lies beside its largest entry, and sum_j q_j (m - z_j).
  void sums() {
    D most = {};
    for (int64_t j = 0; j < padded_; j += L) {
      const D q = load(rows_.q + j);
      most = max(select(q < 0, -q, q), most);
    }
    double largest = most[0];
    for (int k = 1; k < L; k++) largest = most[k] > largest ? most[k] : largest;
    heavy_ = 0;
    for (int64_t j = 0; j < V_; j++)
      if (std::fabs(rows_.q[j]) == largest) {
        heavy_ = j;
        break;
      }
    LaneSum others, below;
    for (int64_t j = 0; j < padded_; j += L) {
      D q = load(rows_.q + j);
      const D h = load(rows_.z + j), low = load(rows_.low + j);
      below.add(select(q == 0, D{}, -q * h));
      below.add(select(q == 0, D{}, -q * low));
      if (heavy_ >= j && heavy_ < j + L) q[heavy_ - j] = 0;
      others.add(q);
    }
    others_ = others.total().value();
    total_ = rows_.q[heavy_] + others_;
    below_ = below.total().value();
  }

  double loss() const {
    const double plain = total_ * log_all_ + below_;
    return job_.z_loss == 0 ? plain : plain + job_.z_loss * total_ * lse_ * lse_;
  }

  // The gradient in z, to the row `low`.
  void gradient() {
    const double more = job_.z_loss == 0 ? 0 : 2 * job_.z_loss * lse_ * total_;
    const D unit = splat(std::ldexp(1.0, -kBias)), all = splat(all_), sum = splat(total_);
    for (int64_t j = 0; j < padded_; j += L) {
      const D p = load(rows_.e + j) / all * unit, q = load(rows_.q + j);
      D one_minus_p = 1 - p, q_others = sum - q;
      if (top_ >= j && top_ < j + L) one_minus_p[top_ - j] = beside_ / all_;
      if (heavy_ >= j && heavy_ < j + L) q_others[heavy_ - j] = others_;
      store(rows_.low + j, p * q_others - q * one_minus_p + more * p);
    }
  }

  // H x in v, to the row `z`. In z: H y = Q (1 + 2c lse) p (y - ybar) + 2c Q p ybar with ybar = p
  // y, and y - ybar taken from the maximum's entry so that nothing cancels at a confident row.
  void hvp(int64_t i, double u) {
    read_row(job_.vector, i, rows_.y);
    fill(rows_.y, 0);
    const double scale = job_.logit_scale, c2 = 2 * job_.z_loss;
    const D unit = splat(std::ldexp(1.0, -kBias)), all = splat(all_);
    const double y_top = rows_.y[top_] * (rows_.slope ? rows_.slope[top_] : 1) * scale;
    LaneSum spread;
    for (int64_t j = 0; j < padded_; j += L) {
      const D e = load(rows_.e + j), y = load(rows_.y + j) * slope(j) * scale;
      spread.add(select(e == 0, D{}, e / all * unit * (y_top - y)));
    }
    const double delta = spread.total().value(), mean = y_top - delta;
    gradient();
    const double a = total_ * (c2 == 0 ? 1 : 1 + c2 * lse_), b = c2 * total_ * mean;
    for (int64_t j = 0; j < padded_; j += L) {
      const D x = load(rows_.y + j), s = slope(j) * scale, p = load(rows_.e + j) / all * unit;
      D out = select(p == 0, p, p * (a * ((x * s - y_top) + delta) + b)) * s;
      if (rows_.bend) out += load(rows_.low + j) * load(rows_.bend + j) * (scale * scale) * x;
      store(rows_.z + j, out * u);
    }
  }

  static constexpr int64_t kLong = 1 << 22, kPiece = 1 << 20;
  static constexpr double kFlat = 1000;
  // e is held times 2^kBias, out of reach of subnormals.
  static constexpr int kBias = 64;

  const RowJob& job_;
  const int64_t V_, padded_;
  Rows rows_{};
  double scale_ = 1;
  int64_t top_ = 0, heavy_ = 0;  // where p and |q| are largest
  double top_z_ = 0, beside_ = 0, all_ = 1, log_all_ = 0, lse_ = 0;
  double others_ = 0, total_ = 0, below_ = 0;
};

}  // namespace

void serve_general(const RowJob& job, int64_t begin, int64_t end) {
  General general(job);
  if (!general.prepare()) return report_out_of_memory(job);
  for (int64_t i = begin; i < end; i++) general.run(i);
}

void serve_lanes(const RowJob& job, int64_t begin, int64_t end);  // lanes.cpp
void serve_short(const RowJob& job, int64_t begin, int64_t end);  // short.cpp
void serve_hvp(const RowJob& job, int64_t begin, int64_t end);    // hvp.cpp
void count_targets(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                   int64_t* outside, int64_t* skipped);  // counts.cpp
double total(const double* losses, int64_t n);           // counts.cpp
// rows.cpp
void serve_rows(const RowJob& job, int64_t begin, int64_t end);
int64_t part_bytes(const RowJob& job);
bool part_start(const RowJob& job, int64_t i, void* at);
void part_read(const RowJob& job, int64_t i, int64_t part, void* at);
bool part_numbers(const RowJob& job, int64_t i, void* at);
void part_write(const RowJob& job, int64_t i, int64_t part, void* at);

extern const Kernels kernels;
constexpr int64_t kLaneClasses = Lanes<float>::n > 8 ? 48 : 128;
const Kernels kernels = {kLaneClasses,  serve_lanes,   serve_short, serve_hvp,  serve_rows,
                         serve_general, count_targets, total,       part_bytes, part_start,
                         part_read,     part_numbers,  part_write};

}  // namespace CROSSENT_ISA
}  // namespace crossent
