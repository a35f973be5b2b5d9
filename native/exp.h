// exp and tanh in lanes.
//
// Design:
//   a. exp(d) = 2^n (1 + r + r^2 Q(r)) with n = rint(d / ln 2) by adding and subtracting 1.5 * 2^23
//      (2^52), r = d - n ln2 in two fused steps of which the first is exact. Q is a minimax
//      polynomial (Remez, relative error 0.054 and 0.02 of half an ulp), coefficients rounded one
//      after the other. Over all floats in [-86, -2^-32] the error is at most 1.04 ulp.
//   b. The caller asks for exp(d) * 2^shift. The shift is folded into the number that makes n, and
//      2^(n + shift) is built in the exponent field and multiplied in: unlike an addition to the
//      exponent this leaves a NaN of any payload NaN.
//   c. d is clamped from below so that the exponent stays in range; exp is never below kFloor
//   there.
//      What the clamp keeps off zero is at least 2^-30 below anything a result can show (rows.cpp).
#pragma once

#include "simd.h"

namespace crossent {
namespace CROSSENT_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float ln2_hi = 0x1.62e43p-1f, ln2_lo = -0x1.05c610p-29f;
  static constexpr float round = 0x1.8p23f;
  static constexpr int bias = 127, mantissa = 23, floor_exponent = -125;
  static constexpr float q[] = {0x1.fffffcp-2f, 0x1.55548cp-3f, 0x1.555858p-5f, 0x1.123dep-7f,
                                0x1.6ac6b2p-10f};
};
template <>
struct ExpConstants<double> {
  static constexpr double ln2_hi = 0x1.62e42fefa39efp-1, ln2_lo = 0x1.abc9e3b39803fp-56;
  static constexpr double round = 0x1.8p52;
  static constexpr int bias = 1023, mantissa = 52, floor_exponent = -1021;
  static constexpr double q[] = {
      0x1.000000000000ap-1,  0x1.55555555554f9p-3,  0x1.555555555083fp-5,  0x1.1111111127d10p-7,
      0x1.6c16c18438a89p-10, 0x1.a01a012a0e7e8p-13, 0x1.a01999e274b14p-16, 0x1.71df25b516d4cp-19,
      0x1.28ad9b7868661p-22, 0x1.ad7f3b22740dcp-26};
};
// The z-loss multiplies a row's gradient by 1 + 2 c lse. Above this the floor of exp could show in
// it, and the row goes to general.cpp.
constexpr double kMostZLoss = 0x1p20;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.69314718055994531;

CROSSENT_INLINE F exp_tail(F r, F r2) {  // Q(r)
  using C = ExpConstants<float>;
  const F a = fma(splat(C::q[1]), r, splat(C::q[0]));
  const F b = fma(splat(C::q[4]), r2, fma(splat(C::q[3]), r, splat(C::q[2])));
  return fma(b, r2, a);
}
CROSSENT_INLINE D exp_tail(D r, D r2) {
  using C = ExpConstants<double>;
  const D r4 = r2 * r2;
  const D a = fma(splat(C::q[1]), r, splat(C::q[0])), b = fma(splat(C::q[3]), r, splat(C::q[2]));
  const D c = fma(splat(C::q[5]), r, splat(C::q[4])), d = fma(splat(C::q[7]), r, splat(C::q[6]));
  const D e = fma(splat(C::q[9]), r, splat(C::q[8]));
  return fma(fma(e, r4, fma(d, r2, c)), r4, fma(b, r2, a));
}

// exp(. ) * 2^shift for arguments up to about (127 - shift) ln 2.
template <class T>
struct Exp {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::Bits;
  using C = ExpConstants<T>;
  V lowest, round;

  explicit Exp(int shift)
      : lowest(splat(static_cast<T>((C::floor_exponent - shift) * kLn2))),
        round(splat(static_cast<T>(C::round + (shift + C::bias)))) {}

  // A shift for each lane.
  explicit Exp(V shift)
      : lowest((static_cast<T>(C::floor_exponent) - shift) * static_cast<T>(kLn2)),
        round(shift + static_cast<T>(C::round + C::bias)) {}

  // exp(d + low) 2^shift; low is the rounding error of d, or 0.
  template <bool kLow>
  __attribute__((always_inline)) V operator()(V d, V low) const {
    d = max(lowest, d);  // NaN stays
    const V t = fma(d, splat(static_cast<T>(kLog2E)), round);
    const V n = t - round;
    V r = fma(n, splat(-C::ln2_hi), d);
    r = fma(n, splat(-C::ln2_lo), r);
    if (kLow) r += select(d > lowest, low, V{});
    const V r2 = r * r;
    const V p = fma(exp_tail(r, r2), r2, r) + splat(T(1));
    return p * (V)((I)t << C::mantissa);
  }
};

}  // namespace CROSSENT_ISA
}  // namespace crossent
