// The Hessian-vector product for few classes: one row a lane of double.
//
// Design:
//   a. The formula and the numbers are those of general.cpp (its hvp), which has a row's classes in
//      lanes: with ten of them it spends its time on what is done once a row, 300 ns (Zen 3);
//      here 60.
//   b. With index targets and no softcap the product knows of the target only Q, its total weight.
//   c. Which rows come here depends on the options, the number of classes and the kind of target
//      (lane_hvp), never on the layout or on other rows, so neither changes a bit.
#include "doubles.h"
#include "exp.h"
#include "rows.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

constexpr int L = Lanes<double>::n;

// Of each lane.
CROSSENT_INLINE D value(const LaneSum& sum) {
  return select((sum.hi - sum.hi) == 0, sum.hi + sum.lo, sum.hi);
}

class Hvp {
 public:
  explicit Hvp(const RowJob& job) : job_(job), V_(job.logits.classes) {}

  bool prepare() {
    z_ = static_cast<double*>(scratch(4, 2 * V_ * kBytes));
    y_ = z_ + V_ * L;
    return z_ != nullptr;
  }

  // Rows [i, i + n), n <= L.
  void run(int64_t i, int n) {
    alignas(kBytes) double total[L] = {}, scale[L] = {};
    for (int k = 0; k < L; k++) {
      int64_t t;
      if (k < n && job_.kept(i + k, &t)) {
        total[k] = (job_.class_weight ? job_.class_weight[t] : 1) *
                   (job_.on + job_.off * static_cast<double>(V_));
        scale[k] = job_.row_scale(i + k) * job_.row_upstream(i + k);
        read_row(job_.logits, i + k, z_ + k, L);
        read_row(job_.vector, i + k, y_ + k, L);
      } else {  // zeros come to zeros
        for (int64_t j = 0; j < V_; j++) z_[j * L + k] = y_[j * L + k] = 0;
      }
    }
    product(load(total), load(scale));
    for (int k = 0; k < n; k++) write_row(job_.out, i + k, y_ + k, L);
  }

 private:
  // z becomes e = exp(tau (z - m)), and y, the direction, the product.
  void product(D total, D scale) const {
    const D tau = splat(job_.logit_scale);
    D m = splat(-__builtin_huge_val()), top = {};
    for (int64_t j = 0; j < V_; j++) {
      const D z = load(z_ + j * L), y = load(y_ + j * L) * tau;
      store(y_ + j * L, y);
      top = select(z > m, y, top);
      m = max(z, m);
    }
    const Exp<double> exp(kBias);
    LaneSum mass, spread;
    for (int64_t j = 0; j < V_; j++) {
      const D z = load(z_ + j * L), d = z - m, v = d - z;
      const D error = (z - (d - v)) + (-m - v), h = tau * d;  // TwoSum(z, -m)
      const auto finite = (h - h) == 0;
      const D e = select(h < exp.lowest, D{},
                         exp.one(h, select(finite, fma(tau, d, -h) + tau * error, D{})));
      store(z_ + j * L, e);
      mass.add(e);
      spread.add(select(e == 0, D{}, e * kUnit * (top - load(y_ + j * L))));
    }
    const D all = value(mass) * kUnit, share = 1.0 / all;  // NaN where m is not finite
    const D delta = value(spread) * share;
    D slope = total, more = {};
    if (job_.z_loss != 0) {
      const D twice = 2 * job_.z_loss * total;
      slope += twice * (tau * m + log(all));
      more = twice * (top - delta);
    }
    const D by = scale * tau, to_p = share * kUnit;
    for (int64_t j = 0; j < V_; j++) {
      const D p = load(z_ + j * L) * to_p, y = load(y_ + j * L);
      store(y_ + j * L, by * select(p == 0, D{}, p * (slope * ((y - top) + delta) + more)));
    }
  }

  static D log(D x) {
    for (int k = 0; k < L; k++) x[k] = __builtin_log(x[k]);
    return x;
  }

  // e is held times 2^kBias, out of reach of subnormals.
  static constexpr int kBias = 64;
  static constexpr double kUnit = 0x1p-64;

  const RowJob& job_;
  const int64_t V_;
  double *z_ = nullptr, *y_ = nullptr;  // (V, L)
};

}  // namespace

void serve_hvp(const RowJob& job, int64_t begin, int64_t end) {
  Hvp hvp(job);
  if (!hvp.prepare()) return report_out_of_memory(job);
  for (int64_t i = begin; i < end; i += L) hvp.run(i, static_cast<int>(end - i < L ? end - i : L));
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
