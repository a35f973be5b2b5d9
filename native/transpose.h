// A square of floats, transposed in registers.
#pragma once

#include "simd.h"

namespace crossent {
namespace CROSSENT_ISA {

#if defined(__AVX512F__)
CROSSENT_INLINE F zip_low(F a, F b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
CROSSENT_INLINE F zip_high(F a, F b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif defined(__AVX2__)
CROSSENT_INLINE F zip_low(F a, F b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
CROSSENT_INLINE F zip_high(F a, F b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
CROSSENT_INLINE F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
CROSSENT_INLINE F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Zipping the upper half of the rows into the lower one, log2(L) times, is the transpose.
CROSSENT_INLINE void transpose(F (&rows)[Lanes<float>::n]) {
  constexpr int L = Lanes<float>::n;
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    F zipped[L];
#pragma GCC unroll 16
    for (int k = 0; k < L / 2; k++) {
      zipped[2 * k] = zip_low(rows[k], rows[k + L / 2]);
      zipped[2 * k + 1] = zip_high(rows[k], rows[k + L / 2]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) rows[k] = zipped[k];
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
