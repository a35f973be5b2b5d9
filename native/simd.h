// Vectors of one instruction set: GCC/Clang vector extensions, intrinsics only where they are
// missing. Compiled once per instruction set; everything sits in that set's namespace and is static
// or a template over its own types, so that the linker never merges code of two instruction sets.
//
// F and D are vectors of float and double of the same number of bytes.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define CROSSENT_INLINE static inline __attribute__((always_inline))

namespace crossent {
namespace CROSSENT_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int n = kBytes / 4;
  typedef float V __attribute__((vector_size(kBytes)));
  typedef float U __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
};
template <>
struct Lanes<double> {
  static constexpr int n = kBytes / 8;
  typedef double V __attribute__((vector_size(kBytes)));
  typedef double U __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(kBytes)));
  typedef int64_t Ints __attribute__((vector_size(kBytes)));
};
using F = Lanes<float>::V;
using D = Lanes<double>::V;

// (Subtracting 0 is nothing to the compiler; adding it would turn -0 into 0.)
template <class T>
CROSSENT_INLINE typename Lanes<T>::V splat(T x) {
  return x - typename Lanes<T>::V{};
}
template <class T>
CROSSENT_INLINE typename Lanes<T>::V load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::U*>(p);
}
template <class T>
CROSSENT_INLINE void store(T* p, typename Lanes<T>::V x) {
  *reinterpret_cast<typename Lanes<T>::U*>(p) = x;
}

// a*b + c in one rounding. Without the instruction: through double for float (double rounding, and
// exact wherever the result fits a double), with a compensated product for double.
CROSSENT_INLINE F fma(F a, F b, F c);
CROSSENT_INLINE D fma(D a, D b, D c);
// The larger one; y where either is NaN.
CROSSENT_INLINE F max(F x, F y);
CROSSENT_INLINE D max(D x, D y);

#if defined(__AVX512F__)
CROSSENT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
CROSSENT_INLINE D fma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
CROSSENT_INLINE F max(F x, F y) { return _mm512_max_ps(x, y); }
CROSSENT_INLINE D max(D x, D y) { return _mm512_max_pd(x, y); }
CROSSENT_INLINE void stream(float* p, F x) { _mm512_stream_ps(p, x); }
CROSSENT_INLINE void stream(double* p, D x) { _mm512_stream_pd(p, x); }
#elif defined(__AVX2__)
CROSSENT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
CROSSENT_INLINE D fma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
CROSSENT_INLINE F max(F x, F y) { return _mm256_max_ps(x, y); }
CROSSENT_INLINE D max(D x, D y) { return _mm256_max_pd(x, y); }
CROSSENT_INLINE void stream(float* p, F x) { _mm256_stream_ps(p, x); }
CROSSENT_INLINE void stream(double* p, D x) { _mm256_stream_pd(p, x); }
#elif defined(__x86_64__)
CROSSENT_INLINE F max(F x, F y) { return _mm_max_ps(x, y); }
CROSSENT_INLINE D max(D x, D y) { return _mm_max_pd(x, y); }
CROSSENT_INLINE void stream(float* p, F x) { _mm_stream_ps(p, x); }
CROSSENT_INLINE void stream(double* p, D x) { _mm_stream_pd(p, x); }
#else
CROSSENT_INLINE F max(F x, F y) { return x > y ? x : y; }
CROSSENT_INLINE D max(D x, D y) { return x > y ? x : y; }
CROSSENT_INLINE void stream(float* p, F x) { store(p, x); }
CROSSENT_INLINE void stream(double* p, D x) { store(p, x); }
#endif

CROSSENT_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The two halves of a float vector as doubles, and back.
constexpr int kHalf = Lanes<double>::n;
#if defined(__AVX512F__)
CROSSENT_INLINE D low(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
CROSSENT_INLINE D high(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
CROSSENT_INLINE F join(D a, D b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
}
#elif defined(__AVX2__)
CROSSENT_INLINE D low(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
CROSSENT_INLINE D high(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
CROSSENT_INLINE F join(D a, D b) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a)), _mm256_cvtpd_ps(b), 1);
}
#elif defined(__x86_64__)
// Not by lanes, D{x[0], x[1]}: GCC 12 takes such a conversion back, and the rounding with it, in
// one half of the lanes and not in the other.
CROSSENT_INLINE D low(F x) { return _mm_cvtps_pd(x); }
CROSSENT_INLINE D high(F x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); }
CROSSENT_INLINE F join(D a, D b) { return _mm_movelh_ps(_mm_cvtpd_ps(a), _mm_cvtpd_ps(b)); }
#elif defined(__aarch64__)
CROSSENT_INLINE D low(F x) { return (D)vcvt_f64_f32(vget_low_f32((float32x4_t)x)); }
CROSSENT_INLINE D high(F x) { return (D)vcvt_high_f64_f32((float32x4_t)x); }
CROSSENT_INLINE F join(D a, D b) {
  return (F)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)a), (float64x2_t)b);
}
#else
CROSSENT_INLINE D low(F x) { return D{x[0], x[1]}; }
CROSSENT_INLINE D high(F x) { return D{x[2], x[3]}; }
CROSSENT_INLINE F join(D a, D b) {
  F x = {static_cast<float>(a[0]), static_cast<float>(a[1]), static_cast<float>(b[0]),
         static_cast<float>(b[1])};
  asm("" : "+m"(x));  // see above
  return x;
}
#endif

#if defined(__aarch64__)
CROSSENT_INLINE F fma(F a, F b, F c) {
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
CROSSENT_INLINE D fma(D a, D b, D c) {
  return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#elif !defined(__AVX2__)
CROSSENT_INLINE F fma(F a, F b, F c) {
  return join(low(a) * low(b) + low(c), high(a) * high(b) + high(c));
}
CROSSENT_INLINE D fma(D a, D b, D c) {
  const D split = splat(134217729.0);  // 2^27 + 1, Veltkamp
  const D p = a * b;
  D t = split * a, ah = t - (t - a), al = a - ah;
  t = split * b;
  D bh = t - (t - b), bl = b - bh;
  const D product_error = ((ah * bh - p) + ah * bl + al * bh) + al * bl;
  const D s = p + c, v = s - p, sum_error = (p - (s - v)) + (c - v);
  const D r = s + (product_error + sum_error);
  return r == r ? r : s;  // a split that overflowed, or NaN and infinity themselves
}
#endif

// a*b + c for a sum of many: in one rounding where there is an instruction for it, else in two,
// since an exact fma would take ten times as long.
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__aarch64__)
template <class V>
CROSSENT_INLINE V multiply_add(V a, V b, V c) {
  return fma(a, b, c);
}
#else
template <class V>
CROSSENT_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// x where the mask is set, y elsewhere.
template <class M, class V>
CROSSENT_INLINE V select(M mask, V x, V y) {
  return mask ? x : y;
}

// Of masks, whose lanes are all bits or none.
template <class M>
CROSSENT_INLINE bool any_set(M mask) {
#if defined(__AVX2__)
  if constexpr (sizeof(M) == 32) return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#endif
  uint64_t words[sizeof(M) / 8], either = 0;
  memcpy(words, &mask, sizeof words);
  for (uint64_t word : words) either |= word;
  return either != 0;
}
template <class M>
CROSSENT_INLINE bool all_set(M mask) {
  return !any_set(~mask);
}

// The exponent of |x|, -1023 for 0 and 1024 for infinity and NaN: as ilogb, but a few instructions.
CROSSENT_INLINE int exponent(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}

CROSSENT_INLINE void two_sum(double a, double b, double& sum, double& error) {
  sum = a + b;
  const double v = sum - a;
  error = (a - (sum - v)) + (b - v);
}

// hi + lo, what a rounded sum and its rounding errors came to.
struct Word {
  double hi = 0, lo = 0;
  void add(double x) {
    double error;
    two_sum(hi, x, hi, error);
    lo += error;
  }
  void add(Word x) {
    add(x.hi);
    lo += x.lo;
  }
  Word scaled(double by) const { return {hi * by, lo * by}; }  // exact for powers of two
  double value() const { return hi + lo; }
};

// A running sum in double lanes that keeps what each addition rounds away (Knuth's TwoSum).
// Infinity and NaN leave lo NaN: total() looks at hi first.
struct LaneSum {
  D hi = {}, lo = {};
  __attribute__((always_inline)) void add(D x) {
    const D s = hi + x, v = s - hi;
    lo += (hi - (s - v)) + (x - v);
    hi = s;
  }
  Word total() const {
    Word sum;
    for (int k = 0; k < Lanes<double>::n; k++) sum.add(hi[k]);
    for (int k = 0; k < Lanes<double>::n; k++) sum.lo += lo[k];
    if (!(sum.hi - sum.hi == 0)) sum.lo = 0;
    return sum;
  }
};

}  // namespace CROSSENT_ISA
}  // namespace crossent
