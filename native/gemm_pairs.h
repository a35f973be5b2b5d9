// Packing for AVX512_BF16: bfloat16 numbers in pairs, two depths of a row or column in one entry.
//
// The earlier depth is in the lower half of the 32 bits, as a row of bfloat16 has it in memory: so
// such a row is also read in place. An odd depth ends in a pair with 0, on both sides.
#pragma once

#include "gemm_pack.h"

#if defined(__AVX512BF16__)
namespace crossent {
namespace CROSSENT_ISA {

using Pair = uint32_t;
typedef Pair PairsU __attribute__((vector_size(kBytes), aligned(2), may_alias));

// c, and of each pair the later product, then the earlier one.
CROSSENT_INLINE F multiply_add(U32 a, U32 b, F c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

// L numbers in a row. float32 is rounded to nearest even, NaN stays NaN, and a subnormal number
// becomes 0: the products take it for 0 in any case.
template <class S>
CROSSENT_INLINE U16 as_bfloat16(const char* at) {
  const auto* p = reinterpret_cast<const typename S::Type*>(at);
  if constexpr (std::is_same_v<S, Stored<Dtype::kBFloat16>>) {
    return *reinterpret_cast<const U16U*>(p);
  } else {
    return (U16)_mm512_cvtneps_pbh(S::load(p));
  }
}

// Pairs of two depths whose other axis is contiguous.
template <class S>
CROSSENT_INLINE U32 pairs_across(const char* earlier, const char* later) {
  return __builtin_convertvector(as_bfloat16<S>(earlier), U32) |
         __builtin_convertvector(as_bfloat16<S>(later), U32) << 16;
}

// Pairs of the 2 L depths that follow one another.
template <class S>
CROSSENT_INLINE F pairs_along(const char* at) {
  const auto* p = reinterpret_cast<const typename S::Type*>(at);
  if constexpr (std::is_same_v<S, Stored<Dtype::kBFloat16>>) {
    return (F) * reinterpret_cast<const PairsU*>(p);
  } else {
    return (F)_mm512_cvtne2ps_pbh(S::load(p + Lanes<float>::n), S::load(p));
  }
}

template <class S>
CROSSENT_INLINE Pair one_bfloat16(const char* at) {
  if constexpr (std::is_same_v<S, Stored<Dtype::kBFloat16>>) {
    typename S::Type bits;
    __builtin_memcpy(&bits, at, sizeof bits);
    return bits;
  } else {
    return ((U16)_mm512_cvtneps_pbh(splat(load_one<S>(at))))[0];
  }
}

// Entries [i, i + n) x depths [k0, k1) of a side to at[(k - k0) / 2 * width + r], 0 for r >= n. A
// vector may be written beyond the end where the width is less than one.
template <class S, int width>
void pack_pairs(const Side& side, int64_t i, int64_t n, int64_t k0, int64_t k1, Pair* at) {
  constexpr int L = Lanes<float>::n, kRows = width < L ? width : L, kParts = width / kRows;
  constexpr int64_t kSize = sizeof(typename S::Type);
  const char* from = side.data + i * side.stride + k0 * side.depth_stride;
  const int64_t depth = k1 - k0;
  int64_t k = 0;
  if (n < width)
    for (int64_t j = 0; j < (depth + 1) / 2 * width; j++) at[j] = 0;
  if (side.stride == kSize && (width < L ? i + L <= side.n : n == width)) {
    // The lanes beyond the width give way to the next pair's numbers.
    for (; k + 2 <= depth; k += 2) {
      const char* row = from + k * side.depth_stride;
#pragma GCC unroll 3
      for (int v = 0; v < kParts; v++, row += kRows * kSize)
        *reinterpret_cast<PairsU*>(at + k / 2 * width + v * kRows) =
            pairs_across<S>(row, row + side.depth_stride);
    }
  } else if (side.depth_stride == kSize && n == width) {
    for (; k + 2 * L <= depth; k += 2 * L)
      for (int v = 0; v < kParts; v++) {
        F rows[kRows];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++)
          rows[r] = pairs_along<S>(from + (v * kRows + r) * side.stride + k * kSize);
        transpose(rows);  // L / kRows depths to a vector
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++)
          *reinterpret_cast<PairsU*>(at + (k / 2 + r * (L / kRows)) * width + v * kRows) =
              (U32)rows[r];
      }
  }
  for (; k < depth; k += 2)
    for (int64_t r = 0; r < n; r++) {
      const char* row = from + r * side.stride + k * side.depth_stride;
      const Pair later = k + 1 < depth ? one_bfloat16<S>(row + side.depth_stride) : 0;
      at[k / 2 * width + r] = one_bfloat16<S>(row) | later << 16;
    }
}

template <int width>
void pack_any(const Side& side, int64_t i, int64_t n, int64_t k0, int64_t k1, Pair* at) {
  if (side.dtype == Dtype::kBFloat16)
    return pack_pairs<Stored<Dtype::kBFloat16>, width>(side, i, n, k0, k1, at);
  pack_pairs<Stored<Dtype::kFloat32>, width>(side, i, n, k0, k1, at);
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
#endif
