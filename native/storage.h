// How numbers lie in memory: the four dtypes, loaded to and stored from lanes of their compute
// type.
#pragma once

#include "rows.h"
#include "simd.h"

namespace crossent {
namespace CROSSENT_ISA {

typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));
typedef uint16_t U16U __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

// bfloat16 is the upper half of a float; rounding is to nearest even, NaN stays NaN.
struct BFloat16 {
  static __attribute__((always_inline)) F from(U16 h) {
    return (F)(__builtin_convertvector(h, U32) << 16);
  }
  static __attribute__((always_inline)) U16 to(F x) {
#if defined(__AVX512BF16__)
    // The instruction takes subnormal numbers for 0; the rest it rounds as below.
    constexpr int kSubnormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, kSubnormal) == 0, 1))
      return (U16)_mm512_cvtneps_pbh(x);
#endif
    const U32 u = (U32)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return __builtin_convertvector(select(x == x, rounded, (u >> 16) | 0x40u), U16);
  }
};

struct Float16 {
#if defined(__AVX512F__)
  static __attribute__((always_inline)) F from(U16 h) { return _mm512_cvtph_ps((__m256i)h); }
  static __attribute__((always_inline)) U16 to(F x) {
    return (U16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__F16C__)
  static __attribute__((always_inline)) F from(U16 h) { return _mm256_cvtph_ps((__m128i)h); }
  static __attribute__((always_inline)) U16 to(F x) {
    return (U16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__aarch64__)
  static __attribute__((always_inline)) F from(U16 h) { return (F)vcvt_f32_f16((float16x4_t)h); }
  static __attribute__((always_inline)) U16 to(F x) { return (U16)vcvt_f16_f32((float32x4_t)x); }
#else
  // The exponent is moved by multiplying with 2^112, which makes subnormals right by itself.
  static __attribute__((always_inline)) F from(U16 half) {
    const U32 h = __builtin_convertvector(half, U32), magnitude = (h & 0x7fffu) << 13;
    const U32 finite = (U32)((F)magnitude * splat(0x1p112f)), special = magnitude | 0x7f800000u;
    return (F)(select(magnitude >= 0x0f800000u, special, finite) | ((h & 0x8000u) << 16));
  }
  static __attribute__((always_inline)) U16 to(F x) {
    const U32 bits = (U32)x, sign = (bits >> 16) & 0x8000u, u = bits & 0x7fffffffu;
    const U32 normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    const U32 tiny = (U32)((F)u + splat(0.5f)) - 0x3f000000u;  // the addition rounds at 2^-24
    U32 r = select(u < 0x38800000u, tiny, normal);
    r = select(u >= 0x477ff000u, U32{} + 0x7c00u, r);
    r = select(u > 0x7f800000u, U32{} + 0x7e00u, r);
    return __builtin_convertvector(r | sign, U16);
  }
#endif
};

template <class Number>
struct StoredPlain {
  using Type = Number;
  using T = Number;
  using V = typename Lanes<T>::V;
  static V load(const Type* p) { return ::crossent::CROSSENT_ISA::load(p); }
  static void store(Type* p, V x) { ::crossent::CROSSENT_ISA::store(p, x); }
  static void stream(Type* p, V x) { ::crossent::CROSSENT_ISA::stream(p, x); }
  static constexpr bool kStreams = true;
};
template <class Format>
struct StoredHalf {
  using Type = uint16_t;
  using T = float;
  using V = F;
  static V load(const Type* p) { return Format::from(*reinterpret_cast<const U16U*>(p)); }
  static void store(Type* p, V x) { *reinterpret_cast<U16U*>(p) = Format::to(x); }
#if defined(__AVX512F__)
  static void stream(Type* p, V x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)Format::to(x));
  }
  static constexpr bool kStreams = true;
#elif defined(__AVX2__)
  static void stream(Type* p, V x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)Format::to(x));
  }
  static constexpr bool kStreams = true;
#else
  static void stream(Type* p, V x) { store(p, x); }
  static constexpr bool kStreams = false;
#endif
};

template <Dtype>
struct StoredAs;
template <>
struct StoredAs<Dtype::kFloat16> {
  using type = StoredHalf<Float16>;
};
template <>
struct StoredAs<Dtype::kBFloat16> {
  using type = StoredHalf<BFloat16>;
};
template <>
struct StoredAs<Dtype::kFloat32> {
  using type = StoredPlain<float>;
};
template <>
struct StoredAs<Dtype::kFloat64> {
  using type = StoredPlain<double>;
};
template <Dtype dtype>
using Stored = typename StoredAs<dtype>::type;

// Calls task(S) with the storage of a dtype.
template <class Task>
auto with_storage(Dtype dtype, const Task& task) {
  switch (dtype) {
    case Dtype::kFloat16:
      return task(Stored<Dtype::kFloat16>());
    case Dtype::kBFloat16:
      return task(Stored<Dtype::kBFloat16>());
    case Dtype::kFloat32:
      return task(Stored<Dtype::kFloat32>());
    default:
      return task(Stored<Dtype::kFloat64>());
  }
}

// An output that no cache will hold is better written past it.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// The first n lanes from p (1 <= n <= L), `fill` in the others; the first n lanes to p.
template <class S>
CROSSENT_INLINE typename S::V load_part(const typename S::Type* p, int n, typename S::T fill) {
  using T = typename S::T;
  alignas(kBytes) typename S::Type part[Lanes<T>::n] = {};
  alignas(kBytes) T lanes[Lanes<T>::n];
  for (int k = 0; k < n; k++) part[k] = p[k];
  store(lanes, S::load(part));
  for (int k = 0; k < Lanes<T>::n; k++) lanes[k] = k < n ? lanes[k] : fill;
  return load(lanes);
}
template <class S>
CROSSENT_INLINE void store_part(typename S::Type* p, int n, typename S::V x) {
  alignas(kBytes) typename S::Type part[Lanes<typename S::T>::n];
  S::store(part, x);
  for (int k = 0; k < n; k++) p[k] = part[k];
}

#if defined(__AVX512F__) || defined(__AVX2__)
// Masks where the instruction set has them.
#if defined(__AVX512F__)
CROSSENT_INLINE unsigned first_lanes(int n) { return (1u << n) - 1; }
CROSSENT_INLINE F load_first(const float* p, int n, float fill) {
  return _mm512_mask_loadu_ps(splat(fill), static_cast<__mmask16>(first_lanes(n)), p);
}
CROSSENT_INLINE D load_first(const double* p, int n, double fill) {
  return _mm512_mask_loadu_pd(splat(fill), static_cast<__mmask8>(first_lanes(n)), p);
}
CROSSENT_INLINE void store_first(float* p, int n, F x) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(n)), x);
}
CROSSENT_INLINE void store_first(double* p, int n, D x) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), x);
}
#else
CROSSENT_INLINE __m256i first_floats(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CROSSENT_INLINE __m256i first_doubles(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
CROSSENT_INLINE F load_first(const float* p, int n, float fill) {
  const __m256i m = first_floats(n);
  return _mm256_blendv_ps(splat(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
CROSSENT_INLINE D load_first(const double* p, int n, double fill) {
  const __m256i m = first_doubles(n);
  return _mm256_blendv_pd(splat(fill), _mm256_maskload_pd(p, m), _mm256_castsi256_pd(m));
}
CROSSENT_INLINE void store_first(float* p, int n, F x) {
  _mm256_maskstore_ps(p, first_floats(n), x);
}
CROSSENT_INLINE void store_first(double* p, int n, D x) {
  _mm256_maskstore_pd(p, first_doubles(n), x);
}
#endif
template <>
inline __attribute__((always_inline)) F load_part<StoredPlain<float>>(const float* p, int n,
                                                                      float fill) {
  return load_first(p, n, fill);
}
template <>
inline __attribute__((always_inline)) D load_part<StoredPlain<double>>(const double* p, int n,
                                                                       double fill) {
  return load_first(p, n, fill);
}
template <>
inline __attribute__((always_inline)) void store_part<StoredPlain<float>>(float* p, int n, F x) {
  store_first(p, n, x);
}
template <>
inline __attribute__((always_inline)) void store_part<StoredPlain<double>>(double* p, int n, D x) {
  store_first(p, n, x);
}
#endif

// One number, wherever it lies.
template <class S>
CROSSENT_INLINE typename S::T load_one(const char* at) {
  if constexpr (sizeof(typename S::Type) == sizeof(typename S::T)) {
    typename S::T x;
    __builtin_memcpy(&x, at, sizeof x);
    return x;
  } else {
    return load_part<S>(reinterpret_cast<const typename S::Type*>(at), 1, 0.0f)[0];
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
