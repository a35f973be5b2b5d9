// Holds losses, gradients, softmax and log-softmax of every instruction set against long double, in
// the bounds of docs/numerics.md. For machines on which the Python tests do not run: make aarch64.
// The formulas are those of docs/maths.md; complements are sums of the others.
//
//   accuracy_driver       on the first error beyond its bound a line and exit status 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../dispatch.h"
#include "../parallel.h"
#include "buffer.h"
#include "verdict.h"

namespace {

using namespace crossent;

constexpr int64_t kRows = 19;  // two vectors of 16 lanes, the last one not full
constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};

// The spacing of a dtype's numbers at x.
Real spacing(Dtype dtype, Real x) {
  constexpr int kDigits[] = {11, 8, 24, 53}, kLowest[] = {-14, -126, -126, -1022};
  const int k = static_cast<int>(dtype);
  const int e = x == 0 ? kLowest[k] : std::max(std::ilogb(x), kLowest[k]);
  return std::ldexp(Real{1}, e - (kDigits[k] - 1));
}

// For each number the sum of all others: nothing is subtracted, so nothing cancels.
std::vector<Real> sums_of_others(const std::vector<Real>& x) {
  std::vector<Real> sums(x.size());
  Real before = 0, after = 0;
  for (size_t j = 0; j < x.size(); j++) sums[j] += before, before += x[j];
  for (size_t j = x.size(); j-- > 0;) sums[j] += after, after += x[j];
  return sums;
}

// One row, exactly.
class Exact {
 public:
  Exact(const std::vector<Real>& z, const std::vector<Real>& q)
      : z_(z), e_(z.size()), q_(q), other_q_(sums_of_others(q)) {
    top_ = static_cast<size_t>(std::max_element(z_.begin(), z_.end()) - z_.begin());
    for (size_t j = 0; j < z_.size(); j++) e_[j] = std::exp(z_[j] - z_[top_]);
    other_e_ = sums_of_others(e_);
    sum_ = e_[top_] + other_e_[top_];
    rest_ = std::log1p(other_e_[top_]);
  }
  Real probability(size_t j) const { return e_[j] / sum_; }
  Real loss(size_t j) const { return (z_[top_] - z_[j]) + rest_; }  // lse - z_j
  Real loss() const {
    Real sum = 0;
    for (size_t j = 0; j < q_.size(); j++) sum += q_[j] * loss(j);
    return sum;
  }
  // The terms A and B of the gradient at j.
  Real a(size_t j) const { return probability(j) * other_q_[j]; }
  Real b(size_t j) const { return q_[j] * other_e_[j] / sum_; }

 private:
  std::vector<Real> z_, e_, q_, other_e_, other_q_;
  size_t top_ = 0;
  Real sum_ = 0, rest_ = 0;
};

// `ulps` of the compute dtype at `scale`, and for a 16-bit output its own rounding besides.
Real bound_for(Dtype dtype, int ulps, Real scale, Real exact) {
  const bool wide = dtype == Dtype::kFloat64, half = size_of(dtype) == 2;
  const Real b = ulps * spacing(wide ? Dtype::kFloat64 : Dtype::kFloat32, scale);
  return half ? b + spacing(dtype, std::fabs(exact) + b) / 2 : b;
}

void check(Dtype dtype, Task task, Target kind, int64_t classes, double size, Verdict& verdict) {
  const Layout layout = classes % 2 ? Layout::kPlain : Layout::kInner;
  Buffer logits(dtype, kRows, classes, layout), out(dtype, kRows, classes, layout);
  Buffer desired(dtype, kRows, classes, layout);
  std::mt19937 random(static_cast<unsigned>(classes));
  logits.fill(random, size);
  std::vector<int64_t> target;
  std::vector<double> loss(kRows);
  for (int64_t i = 0; i < kRows; i++) {
    target.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(classes)));
    if (i % 3 == 0) logits.put(i, target[static_cast<size_t>(i)], 5 * size);  // a confident row
    for (int64_t j = 0; j < classes; j++)
      desired.put(i, j, static_cast<double>(random() % 8) / static_cast<double>(classes));
  }
  RowJob job;
  job.task = task;
  job.kind = kind;
  job.n_rows = kRows;
  job.logits = logits.view;
  job.out = out.view;
  job.target = target.data();
  job.distribution = desired.view;
  job.skip = -100;
  if (task == Task::kLoss) job.loss = loss.data();
  if (run(job, nullptr, nullptr, nullptr) != Outcome::kDone)
    return verdict.see("not done", -1, 1, 0, 0);

  const bool index = kind == Target::kIndex;
  const int ulps = kind == Target::kDistribution ? 8 : 4;
  const Dtype loss_dtype = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const auto V = static_cast<size_t>(classes);
  for (int64_t i = 0; i < kRows; i++) {
    std::vector<Real> z(V), q(V);
    for (size_t j = 0; j < V; j++) {
      const auto column = static_cast<int64_t>(j);
      z[j] = logits.get(i, column);
      q[j] = index ? column == target[static_cast<size_t>(i)] : desired.get(i, column);
    }
    const Exact exact(z, q);
    const std::string at = current_isa() + ", " + kNames[static_cast<int>(dtype)] + ", task " +
                           std::to_string(static_cast<int>(task)) + ", target " +
                           std::to_string(static_cast<int>(kind)) + ", V " +
                           std::to_string(classes) + ", row " + std::to_string(i);
    for (size_t j = 0; j < V; j++) {
      Real value, scale;
      if (task == Task::kLoss) {
        const Real a = exact.a(j), b = exact.b(j);
        value = a - b;
        scale = std::max(a, b);  // with an index target one of them is 0
      } else {
        value = task == Task::kSoftmax ? exact.probability(j) : -exact.loss(j);
        scale = value;
      }
      verdict.see(at, static_cast<int64_t>(j), out.get(i, static_cast<int64_t>(j)), value,
                  bound_for(dtype, ulps, scale, value));
    }
    if (job.loss)
      verdict.see(at, -1, loss[static_cast<size_t>(i)], exact.loss(),
                  ulps * spacing(loss_dtype, exact.loss()));
  }
}

struct Kind {
  Task task;
  Target target;
};
constexpr Kind kKinds[] = {{Task::kLoss, Target::kIndex},
                           {Task::kLoss, Target::kDistribution},
                           {Task::kSoftmax, Target::kNone},
                           {Task::kLogSoftmax, Target::kNone}};

}  // namespace

int main() {
  std::vector<int64_t> classes = {1000, 5000};
  for (int64_t v = 1; v <= 100; v++) classes.push_back(v);
  set_num_threads(2);
  bool good = true;
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    for (const Dtype dtype :
         {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
      Verdict verdict;
      for (const Kind& kind : kKinds)
        for (const int64_t v : classes)
          for (const double size : {3.0, 12.0})
            check(dtype, kind.task, kind.target, v, size, verdict);
      std::printf("accuracy_driver: %s, %s: the worst error is %.3Lf of its bound\n", isa.c_str(),
                  kNames[static_cast<int>(dtype)], verdict.worst);
      good &= verdict.good;
    }
  }
  return good ? 0 : 1;
}
