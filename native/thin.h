// The fused head for few classes: one pass over the features. A block of rows is multiplied with
// the weights, its logits become their gradient, and the weights' gradient takes its share, all
// while the block is in the cache: the step takes as long as the features take to be read, or the
// two products to be computed.
//
// Design:
//   a. The rows are cut into kSlots slots, fixed by the shapes; a slot has a gradient of the
//      weights of its own, and these are added in order at the end: the same bits for any threads.
//   b. The products are those of gemm.h, tile by tile (without pairs: here bfloat16 is widened on
//      each instruction set), or with few classes those of along.h. A row's logits are padded to
//      whole panels, and so are at once the packed side of gᵀ x.
//   c. For the Hessian the panels of W and of a direction W' lie side by side: a row's logits are
//      followed by their change x W'ᵀ + b', and x is read once for both.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "rows.h"

namespace crossent {

struct ThinJob {
  Matrix x, w;                 // (N, D) and (V, D)
  const void* bias = nullptr;  // (V,), of the outputs' type
  RowJob rows;                 // of N rows and V classes; its arrays (·, V) are the pass's own
  bool wide = false;           // double, as either of x and w is; else float
  // Gradients, of that type; null: not wanted. They are written, or added to.
  char *dx = nullptr, *dw = nullptr, *db = nullptr;  // (N, D), (V, D), (V,), contiguous rows
  int64_t dx_stride = 0, dw_stride = 0;              // in entries
  bool accumulate = false;                           // dw and db
  // With the task kHvp it is not the gradients in W and b but the Hessian's, x held fixed, times
  // this: a direction in w (no data: none) and one in the bias (null: none), of their types.
  Matrix along_w;                    // (V, D)
  const void* along_bias = nullptr;  // (V,)
};

// Are there few enough classes, and room for the slots' gradients?
bool thin(int64_t n_classes, int64_t n_features, bool wide);

// `total`, if given, takes the sum of the losses; else rows.loss takes them.
Outcome run_thin(const ThinJob& job, double* total, bool (*poll)(void*), void* poll_context);

}  // namespace crossent
