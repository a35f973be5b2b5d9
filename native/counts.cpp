// What the host (dispatch.cpp) has an instruction set do for it beside rows: the targets counted
// and the losses added up.
#include "rows.h"
#include "total.h"

namespace crossent {
namespace CROSSENT_ISA {

void count_targets(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                   int64_t* outside, int64_t* skipped) {
  const auto limit = static_cast<uint64_t>(n_classes);
  int64_t bad = 0, none = 0;
  for (int64_t i = 0; i < n; i++) {
    none += target[i] == skip;
    bad += (static_cast<uint64_t>(target[i]) >= limit) & (target[i] != skip);
  }
  *outside = bad;
  *skipped = none;
}

double total(const double* losses, int64_t n) {
  Total total;
  total.add(losses, n);
  return total.value();
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
