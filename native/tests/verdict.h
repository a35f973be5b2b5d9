// How far results are from exact ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace crossent {

using Real = long double;

// The worst error met, and whether all were within their bounds.
struct Verdict {
  bool good = true;
  Real worst = 0;  // in bounds

  // `column` is -1 where there is none.
  void see(const std::string& row, int64_t column, double got, Real exact, Real bound) {
    const Real error = std::fabs(got - exact);
    if (error <= bound) {
      if (bound > 0) worst = std::max(worst, error / bound);
      return;
    }
    if (good)
      std::fprintf(stderr, "%s, column %d: got %.17g, exactly %.20Lg: %.3Lg times its bound\n",
                   row.c_str(), static_cast<int>(column), got, exact, error / bound);
    good = false;
  }
};

}  // namespace crossent
