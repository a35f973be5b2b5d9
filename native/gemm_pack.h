// Packing one side of a matrix product: numbers of any dtype and strides, in the order that the
// innermost tile reads them, depth by depth.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "storage.h"
#include "transpose.h"

namespace crossent {
namespace CROSSENT_ISA {

// Entries [i, i + n) x depths [k0, k1) of a side to at[(k - k0) * width + r], 0 for r >= n. A
// vector may be written beyond the end where the width is less than one.
template <class S, class T, int width>
void pack(const Side& side, int64_t i, int64_t n, int64_t k0, int64_t k1, T* at) {
  using Type = typename S::Type;
  constexpr int L = Lanes<typename S::T>::n;
  constexpr int64_t kSize = sizeof(Type);
  const char* from = side.data + i * side.stride + k0 * side.depth_stride;
  const int64_t depth = k1 - k0;
  constexpr bool kSame = std::is_same_v<T, typename S::T>;
  int64_t k = 0;
  if (n < width)
    for (int64_t j = 0; j < depth * width; j++) at[j] = 0;
  if constexpr (kSame) {
    if (side.stride == kSize && width < L && i + L <= side.n) {
      // The lanes beyond the width give way to the next depth's numbers.
      for (; k < depth; k++)
        store(at + k * width, S::load(reinterpret_cast<const Type*>(from + k * side.depth_stride)));
    } else if (side.stride == kSize && n == width && width % L == 0) {
      for (; k < depth; k++) {
        const auto* row = reinterpret_cast<const Type*>(from + k * side.depth_stride);
#pragma GCC unroll 3
        for (int v = 0; v < width / L; v++) store(at + k * width + v * L, S::load(row + v * L));
      }
    } else if constexpr (std::is_same_v<T, float> && width % L == 0) {
      if (side.depth_stride == kSize && n == width) {
        for (; k + L <= depth; k += L)
          for (int v = 0; v < width / L; v++) {
            F square[L];
#pragma GCC unroll 16
            for (int r = 0; r < L; r++)
              square[r] = S::load(
                  reinterpret_cast<const Type*>(from + (v * L + r) * side.stride + k * kSize));
            transpose(square);
#pragma GCC unroll 16
            for (int r = 0; r < L; r++) store(at + (k + r) * width + v * L, square[r]);
          }
      }
    }
  }
  for (; k < depth; k++)
    for (int64_t r = 0; r < n; r++)
      at[k * width + r] =
          static_cast<T>(load_one<S>(from + r * side.stride + k * side.depth_stride));
}

template <int width, class T>
void pack_any(const Side& side, int64_t i, int64_t n, int64_t k0, int64_t k1, T* at) {
  switch (side.dtype) {
    case Dtype::kFloat16:
      return pack<Stored<Dtype::kFloat16>, T, width>(side, i, n, k0, k1, at);
    case Dtype::kBFloat16:
      return pack<Stored<Dtype::kBFloat16>, T, width>(side, i, n, k0, k1, at);
    case Dtype::kFloat32:
      return pack<Stored<Dtype::kFloat32>, T, width>(side, i, n, k0, k1, at);
    case Dtype::kFloat64:
      return pack<Stored<Dtype::kFloat64>, T, width>(side, i, n, k0, k1, at);
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
