// A square of floats, or some of its rows, transposed in registers.
#pragma once

#include "simd.h"

namespace crossent {
namespace CROSSENT_ISA {

#if defined(__AVX512F__) || !defined(__AVX2__)
#if defined(__AVX512F__)
CROSSENT_INLINE F zip_low(F a, F b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
CROSSENT_INLINE F zip_high(F a, F b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#else
CROSSENT_INLINE F zip_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
CROSSENT_INLINE F zip_high(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Zipping the upper half of the rows into the lower one, log2(n) times, is the transpose. Of fewer
// rows than there are lanes a vector then holds as many columns as make it full.
template <int n>
CROSSENT_INLINE void transpose(F (&rows)[n]) {
  static_assert(n > 1 && (n & (n - 1)) == 0 && n <= Lanes<float>::n, "half and half again");
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    F zipped[n];
#pragma GCC unroll 16
    for (int k = 0; k < n / 2; k++) {
      zipped[2 * k] = zip_low(rows[k], rows[k + n / 2]);
      zipped[2 * k + 1] = zip_high(rows[k], rows[k + n / 2]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) rows[k] = zipped[k];
  }
}
#else
// Within the halves of vectors as far as it goes: what crosses them, as a zip of eight lanes does
// twice, costs an instruction more. Four by four, then the halves change places.
CROSSENT_INLINE void transpose(F (&rows)[8]) {
  F fours[8];
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4) {
    const F a = _mm256_unpacklo_ps(rows[k], rows[k + 1]);
    const F b = _mm256_unpackhi_ps(rows[k], rows[k + 1]);
    const F c = _mm256_unpacklo_ps(rows[k + 2], rows[k + 3]);
    const F d = _mm256_unpackhi_ps(rows[k + 2], rows[k + 3]);
    fours[k] = (F)_mm256_unpacklo_pd((D)a, (D)c);
    fours[k + 1] = (F)_mm256_unpackhi_pd((D)a, (D)c);
    fours[k + 2] = (F)_mm256_unpacklo_pd((D)b, (D)d);
    fours[k + 3] = (F)_mm256_unpackhi_pd((D)b, (D)d);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    rows[k] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20);
    rows[k + 4] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31);
  }
}
#endif

}  // namespace CROSSENT_ISA
}  // namespace crossent
