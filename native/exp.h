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
//   c. d is clamped from below so that the exponent stays in range; exp is never below the floor
//      there. What the clamp keeps off zero is at least 2^-30 below anything a result can show
//      (rows.cpp).
//   d. One exp is a chain of some fifty cycles, more than a core looks ahead in code this dense: so
//      several vectors are worked on in turn, step by step (0.42 to 0.34 ns a float on Zen 3).
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

// How a logit z becomes the argument of exp: as it is, z - origin, or scale (z - origin).
enum class Form { kPlain, kShifted, kScaled };

// exp(.) 2^shift for arguments up to about (127 - shift) ln 2.
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

  // d becomes exp(d + low) 2^shift; low is the rounding error of d, and not read unless kLow.
  template <bool kLow, int n>
  __attribute__((always_inline)) void operator()(V (&d)[n], const V (&low)[n]) const {
    V t[n], q[n], r2[n];
#define EACH _Pragma("GCC unroll 8") for (int k = 0; k < n; k++)
    EACH d[k] = max(lowest, d[k]);  // NaN stays
    EACH t[k] = fma(d[k], splat(static_cast<T>(kLog2E)), round);
    EACH q[k] = t[k] - round;
    EACH r2[k] = kLow ? select(d[k] > lowest, low[k], V{}) : V{};
    EACH d[k] = fma(q[k], splat(-C::ln2_hi), d[k]);
    EACH d[k] = fma(q[k], splat(-C::ln2_lo), d[k]);
    if (kLow) EACH d[k] += r2[k];
    EACH r2[k] = d[k] * d[k];
    tail(d, r2, q);
    EACH q[k] = fma(q[k], r2[k], d[k]);
    EACH t[k] = (V)((I)t[k] << C::mantissa);
    EACH d[k] = fma(q[k], t[k], t[k]);
  }

  __attribute__((always_inline)) V one(V d) const {
    V x[1] = {d};
    operator()<false>(x, x);
    return x[0];
  }
  __attribute__((always_inline)) V one(V d, V low) const {
    V x[1] = {d}, y[1] = {low};
    operator()<true>(x, y);
    return x[0];
  }

 private:
  template <int n>  // q = Q(r)
  static __attribute__((always_inline)) void tail(const F (&r)[n], const F (&r2)[n], F (&q)[n]) {
    F a[n];
    EACH q[k] = fma(splat(C::q[3]), r[k], splat(C::q[2]));
    EACH a[k] = fma(splat(C::q[1]), r[k], splat(C::q[0]));
    EACH q[k] = fma(splat(C::q[4]), r2[k], q[k]);
    EACH q[k] = fma(q[k], r2[k], a[k]);
  }
  template <int n>
  static __attribute__((always_inline)) void tail(const D (&r)[n], const D (&r2)[n], D (&q)[n]) {
    D a[n], b[n], r4[n];
    EACH r4[k] = r2[k] * r2[k];
    EACH a[k] = fma(splat(C::q[7]), r[k], splat(C::q[6]));
    EACH b[k] = fma(splat(C::q[5]), r[k], splat(C::q[4]));
    EACH q[k] = fma(splat(C::q[9]), r[k], splat(C::q[8]));
    EACH a[k] = fma(a[k], r2[k], b[k]);
    EACH q[k] = fma(q[k], r4[k], a[k]);
    EACH a[k] = fma(splat(C::q[3]), r[k], splat(C::q[2]));
    EACH b[k] = fma(splat(C::q[1]), r[k], splat(C::q[0]));
    EACH a[k] = fma(a[k], r2[k], b[k]);
    EACH q[k] = fma(q[k], r4[k], a[k]);
  }
#undef EACH
};

}  // namespace CROSSENT_ISA
}  // namespace crossent
