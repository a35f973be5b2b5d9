// The two products of a thin head (thin.h) with lanes along the features, for so few classes that
// tiles of gemm.h would hold more padding than classes: z = x Wᵀ and W's gradient gᵀ x.
//
// Design:
//   a. Both read x where it lies, vector by vector along a row, and are done with a block of its
//      rows while that is in the cache. Only W and its gradient are copied, to rows of whole
//      vectors.
//   b. A number of z is the sum of L lanes, each a chain along the features; these are added at the
//      end. A gradient's number is a chain over a block's rows, added to what earlier blocks left.
//      What else is in a tile has no say, so neither a row's bits nor a class's depend on the rest.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace crossent {

// Memory that is needed next, fetched a few lines at a time.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;  // of 64 bytes
};

// n rows of x, contiguous (n, D); V classes; numbers and bytes as in Matrix.
struct AlongJob {
  const char* x = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t n = 0, n_features = 0, n_classes = 0, row_stride = 0;
  int64_t width = 0;  // of a row of W and of its gradient, in numbers
};

struct AlongKernels {
  // The numbers of a row of D features in W's copy and in its gradient; that many bytes are
  // written.
  int64_t (*width)(int64_t n_features);
  // Copies rows of w (V, D) to `at` (V, width).
  void (*copy)(const Matrix& w, void* at);
  // z (n, stride) = x Wᵀ + bias, with `part` for (n, V, L) numbers.
  void (*logits)(const AlongJob&, const void* w, const void* bias, void* z, int64_t stride,
                 void* part, Ahead ahead);
  // out (V, width) += gᵀ x, with g (n, stride).
  void (*gradient)(const AlongJob&, const void* g, int64_t stride, void* out, Ahead ahead);
};

// For float and for double; up to so many classes they are the faster ones.
struct AlongTable {
  AlongKernels narrow, wide;
  int64_t most_classes, lanes;  // lanes: of float
};

}  // namespace crossent
