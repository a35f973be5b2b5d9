// Sums of doubles that hardly round, for the host or one instruction set.
#pragma once

#include <cstdint>

#if defined(CROSSENT_ISA)
namespace crossent::CROSSENT_ISA {
#else
namespace crossent {
#endif

// A compensated sum (Knuth's TwoSum) in eight lanes, so that one addition need not wait for the
// last.
class Total {
 public:
  void add(int lane, double x) {
    const double s = hi_[lane] + x, v = s - hi_[lane];
    lo_[lane] += (hi_[lane] - (s - v)) + (x - v);
    hi_[lane] = s;
  }
  void add(const double* x, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int k = 0; k < kLanes; k++) add(k, x[i + k]);
    for (int k = 0; i < n; i++, k++) add(k, x[i]);
  }
  double value() const {
    double hi = 0, lo = 0;
    for (int k = 0; k < kLanes; k++) {
      const double s = hi + hi_[k], v = s - hi;
      lo += (hi - (s - v)) + (hi_[k] - v) + lo_[k];
      hi = s;
    }
    return hi - hi == 0 ? hi + lo : hi;  // infinity and NaN leave no rounding error to add
  }
  static constexpr int kLanes = 8;

 private:
  double hi_[kLanes] = {}, lo_[kLanes] = {};
};

}  // namespace crossent
