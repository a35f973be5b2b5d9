// ln(1 + y) for y >= 0 in double lanes, for results that end in float: relative error under 2^-38.
#pragma once

#include "simd.h"

namespace crossent {
namespace CROSSENT_ISA {

// With u = 1 + y = 2^k f, f in [0.71, 1.42): k ln 2 + 2 artanh((f - 1) / (f + 1)), plus what u lost
// of y. The series stops where its terms fall under 2^-40 of the first.
CROSSENT_INLINE D log1p(D y) {
  typedef Lanes<double>::Bits I;
  const D u = y + 1.0;
  // Subtracting the bits of sqrt(1/2) makes the exponent field round at sqrt(2), not at 1.
  const I shifted = (I)u - 0x3fe6a09e667f3bcdu;
  const I exponent = shifted & 0xfff0000000000000u;
  const D f = (D)((I)u - exponent) - 1.0;
  // k as a double: the signed exponent in the low bits of 1.5 * 2^52.
  const I k = (exponent >> 52) + 0x4338000000000000u - ((exponent >> 63) << 12);
  const D s = f / (f + 2.0), z = s * s;
  D series = splat(1.0 / 15);
  series = fma(series, z, splat(1.0 / 13));
  series = fma(series, z, splat(1.0 / 11));
  series = fma(series, z, splat(1.0 / 9));
  series = fma(series, z, splat(1.0 / 7));
  series = fma(series, z, splat(1.0 / 5));
  series = fma(series, z, splat(1.0 / 3));
  const D mantissa = fma(2.0 * s * z, series, 2.0 * s);
  // What u lost matters near u = 1 alone, where dividing it by u changes nothing.
  const D lost = select(u < 2.0, y - (u - 1.0), D{});
  const D result = fma((D)k - 0x1.8p52, splat(0.69314718055994531), mantissa + lost);
  return select((y - y) == 0, result, y);  // infinity and NaN
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
