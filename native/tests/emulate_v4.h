// AVX-512 for a machine without it: included ahead of the kernels (CROSSENT_EMULATE_V4 in
// CMakeLists.txt), it gives x86-64-v4's vectors of 64 bytes and the intrinsics the kernels use,
// each made of two AVX2 halves. So the code for 16 lanes runs and is tested anywhere; what the
// compiler makes of it for real AVX-512 is not.
//
// An intrinsic that is missing here does not compile: GCC and Clang refuse to inline the real one.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#if defined(CROSSENT_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace crossent {
namespace CROSSENT_ISA {
namespace emulated {

#define CROSSENT_EMULATED static inline __attribute__((always_inline))

// A vector as its two halves.
template <class Half>
struct Halves {
  Half low, high;
};
template <class Half, class Whole>
CROSSENT_EMULATED Halves<Half> halves(const Whole& x) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half), "two halves");
  Halves<Half> h;
  std::memcpy(&h, &x, sizeof h);
  return h;
}
template <class Whole, class Half>
CROSSENT_EMULATED Whole whole(Half low, Half high) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half), "two halves");
  const Halves<Half> h = {low, high};
  Whole x;
  std::memcpy(&x, &h, sizeof x);
  return x;
}

CROSSENT_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b), z = halves<__m256>(c);
  return whole<__m512>(_mm256_fmadd_ps(x.low, y.low, z.low),
                       _mm256_fmadd_ps(x.high, y.high, z.high));
}
CROSSENT_EMULATED __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  const auto x = halves<__m256d>(a), y = halves<__m256d>(b), z = halves<__m256d>(c);
  return whole<__m512d>(_mm256_fmadd_pd(x.low, y.low, z.low),
                        _mm256_fmadd_pd(x.high, y.high, z.high));
}
CROSSENT_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b);
  return whole<__m512>(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}
CROSSENT_EMULATED __m512d max_pd(__m512d a, __m512d b) {
  const auto x = halves<__m256d>(a), y = halves<__m256d>(b);
  return whole<__m512d>(_mm256_max_pd(x.low, y.low), _mm256_max_pd(x.high, y.high));
}

// As the instruction does, these fault where p is not aligned to the vector.
inline void need_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}
CROSSENT_EMULATED void stream_ps(float* p, __m512 x) {
  need_alignment(p);
  const auto h = halves<__m256>(x);
  _mm256_stream_ps(p, h.low);
  _mm256_stream_ps(p + 8, h.high);
}
CROSSENT_EMULATED void stream_pd(double* p, __m512d x) {
  need_alignment(p);
  const auto h = halves<__m256d>(x);
  _mm256_stream_pd(p, h.low);
  _mm256_stream_pd(p + 4, h.high);
}

CROSSENT_EMULATED __m512d cvtps_pd(__m256 x) {
  const auto h = halves<__m128>(x);
  return whole<__m512d>(_mm256_cvtps_pd(h.low), _mm256_cvtps_pd(h.high));
}
CROSSENT_EMULATED __m256 cvtpd_ps(__m512d x) {
  const auto h = halves<__m256d>(x);
  return whole<__m256>(_mm256_cvtpd_ps(h.low), _mm256_cvtpd_ps(h.high));
}
CROSSENT_EMULATED __m256 castps512_ps256(__m512 x) { return halves<__m256>(x).low; }
// What the upper half holds is undefined: NaN, so that a use of it shows.
CROSSENT_EMULATED __m512 castps256_ps512(__m256 x) {
  return whole<__m512>(x, _mm256_set1_ps(__builtin_nanf("")));
}
CROSSENT_EMULATED __m256 extractf32x8_ps(__m512 x, int k) {
  const auto h = halves<__m256>(x);
  return k ? h.high : h.low;
}
CROSSENT_EMULATED __m512 insertf32x8(__m512 x, __m256 y, int k) {
  const auto h = halves<__m256>(x);
  return k ? whole<__m512>(h.low, y) : whole<__m512>(y, h.high);
}

CROSSENT_EMULATED __m512 cvtph_ps(__m256i x) {
  const auto h = halves<__m128i>(x);
  return whole<__m512>(_mm256_cvtph_ps(h.low), _mm256_cvtph_ps(h.high));
}
template <int kRounding>
CROSSENT_EMULATED __m256i cvtps_ph(__m512 x) {
  // The narrower instruction knows no _MM_FROUND_NO_EXC: it raises flags that nobody reads.
  constexpr int kMode = kRounding & ~_MM_FROUND_NO_EXC;
  const auto h = halves<__m256>(x);
  return whole<__m256i>(_mm256_cvtps_ph(h.low, kMode), _mm256_cvtps_ph(h.high, kMode));
}

// Lane by lane: what the mask leaves out must not be touched.
template <class V, class Mask, class Number>
CROSSENT_EMULATED V mask_load(V fill, Mask mask, const Number* p) {
  Number lanes[sizeof(V) / sizeof(Number)];
  std::memcpy(lanes, &fill, sizeof fill);
  for (unsigned k = 0; k < sizeof(V) / sizeof(Number); k++)
    if (mask >> k & 1) lanes[k] = p[k];
  std::memcpy(&fill, lanes, sizeof fill);
  return fill;
}
template <class V, class Mask, class Number>
CROSSENT_EMULATED void mask_store(Number* p, Mask mask, V x) {
  Number lanes[sizeof(V) / sizeof(Number)];
  std::memcpy(lanes, &x, sizeof x);
  for (unsigned k = 0; k < sizeof(V) / sizeof(Number); k++)
    if (mask >> k & 1) p[k] = lanes[k];
}

// VCVTNEPS2BF16 as its manual words it: to nearest even whatever MXCSR says, a subnormal becomes a
// zero of its sign, NaN becomes quiet.
CROSSENT_EMULATED __m256i cvtneps_pbh(__m512 x) {
  uint32_t in[16];
  uint16_t out[16];
  std::memcpy(in, &x, sizeof in);
  for (int k = 0; k < 16; k++) {
    const uint32_t u = in[k], exponent = u >> 23 & 0xff, mantissa = u & 0x7fffff;
    uint32_t r;
    if (exponent == 0) {
      r = u >> 16 & 0x8000;
    } else if (exponent == 0xff) {
      r = mantissa == 0 ? u >> 16 : u >> 16 | 0x40;
    } else {
      r = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    out[k] = static_cast<uint16_t>(r);
  }
  __m256i y;
  std::memcpy(&y, out, sizeof y);
  return y;
}
// VCVTNE2PS2BF16: the second operand to the lower half.
CROSSENT_EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  return whole<__m512i>(cvtneps_pbh(low), cvtneps_pbh(high));
}
// Of the classes that VFPCLASSPS knows: subnormal numbers.
template <int kClass>
CROSSENT_EMULATED __mmask16 fpclass_ps_mask(__m512 x) {
  static_assert(kClass == 0x20, "subnormal");
  uint32_t in[16];
  std::memcpy(in, &x, sizeof in);
  unsigned mask = 0;
  for (int k = 0; k < 16; k++)
    mask |= static_cast<unsigned>((in[k] & 0x7f800000) == 0 && (in[k] & 0x7fffff) != 0) << k;
  return static_cast<__mmask16>(mask);
}

// VDPBF16PS as its manual words it: in each lane the products of the upper and then of the lower
// halves are added, exact until the addition rounds to nearest even, whatever MXCSR says; subnormal
// numbers are taken for 0 and given as 0.
CROSSENT_EMULATED __m256 without_subnormals(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), none = _mm256_setzero_si256();
  const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f800000));
  const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80000000)));
  return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, sign, _mm256_cmpeq_epi32(exponent, none)));
}
CROSSENT_EMULATED __m256 add_halves(__m256 sum, __m256i a, __m256i b) {  // the upper ones
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return without_subnormals(
      _mm256_fmadd_ps(without_subnormals(_mm256_castsi256_ps(_mm256_and_si256(a, upper))),
                      without_subnormals(_mm256_castsi256_ps(_mm256_and_si256(b, upper))),
                      without_subnormals(sum)));
}
template <class Pairs>
CROSSENT_EMULATED __m512 dpbf16_ps(__m512 sum, Pairs a, Pairs b) {
  auto s = halves<__m256>(sum);
  const auto x = halves<__m256i>(a), y = halves<__m256i>(b);
  s.low = add_halves(s.low, x.low, y.low);
  s.high = add_halves(s.high, x.high, y.high);
  s.low = add_halves(s.low, _mm256_slli_epi32(x.low, 16), _mm256_slli_epi32(y.low, 16));
  s.high = add_halves(s.high, _mm256_slli_epi32(x.high, 16), _mm256_slli_epi32(y.high, 16));
  return whole<__m512>(s.low, s.high);
}

#undef CROSSENT_EMULATED

}  // namespace emulated
}  // namespace CROSSENT_ISA
}  // namespace crossent

#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_max_ps emulated::max_ps
#define _mm512_max_pd emulated::max_pd
#define _mm512_stream_ps emulated::stream_ps
#define _mm512_stream_pd emulated::stream_pd
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtpd_ps emulated::cvtpd_ps
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castps256_ps512 emulated::castps256_ps512
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_mask_loadu_ps emulated::mask_load<__m512, __mmask16, float>
#define _mm512_mask_loadu_pd emulated::mask_load<__m512d, __mmask8, double>
#define _mm512_mask_storeu_ps emulated::mask_store<__m512, __mmask16, float>
#define _mm512_mask_storeu_pd emulated::mask_store<__m512d, __mmask8, double>
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
// Macros in the compiler's own header where it does not optimise.
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph<(rounding)>(x)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 emulated::insertf32x8
#undef _mm512_fpclass_ps_mask
#define _mm512_fpclass_ps_mask(x, imm) emulated::fpclass_ps_mask<(imm)>(x)
