// The contract between the host (gemm.cpp) and the matrix kernels (gemm_tiles.cpp), and what the
// host offers: out = a b, for the fused head's three products.
//
// Design:
//   a. Of a and b the one with fewer rows or columns is *packed*: in panels of the kernel's width,
//      depth by depth, shared by all threads. The other is *streamed*: read where it lies, as far
//      as its layout allows. So weights of 100,000 classes are never copied, whichever product they
//      are in; where the streamed side runs along the output's columns, a tile is transposed on its
//      way out.
//   b. An entry's sum runs over the depth in blocks of 128, one fused multiply-add after the
//      other, and the blocks are added in order. Nothing else of the shapes, the layout or the
//      threads has a say, so a row's bits do not depend on the rows beside it.
//   c. float16 and bfloat16 become float as they are packed; sums are float, or double for double.
//   d. Where the instruction set has AVX512_BF16, bfloat16 times bfloat16 goes two depths at a time
//      (vdpbf16ps). Its products are exact and its sums float, each addition rounded to nearest
//      even, so only the order differs: of two depths the later one is added first, and blocks
//      are of 256. It takes subnormal numbers for 0 and makes sums below 2^-126 0.
//   e. float beside bfloat16 is widened for, and nothing is rounded, unless the caller says
//      `may_round`: then, on that instruction set, the float side becomes bfloat16 as it is packed,
//      to nearest even, each number with a relative error of 2^-8 at most, and goes as in d.
#pragma once

#include <cstdint>

#include "rows.h"

namespace crossent {

// One operand, seen from its own side: entry (i, k), k along the sum. Strides in bytes.
struct Side {
  const char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t n = 0, stride = 0, depth_stride = 0;
};

struct GemmJob {
  Side streamed, packed;
  int64_t depth = 0;
  char* out = nullptr;         // float, or double if either side is
  bool wide = false;           // double
  bool across = false;         // out's rows run along `packed`, its columns along `streamed`
  int64_t out_stride = 0;      // from row to row, in entries; columns are contiguous
  const void* bias = nullptr;  // one a column, of out's type
  bool accumulate = false;
  bool* no_memory = nullptr;
  // What a tile fetches into the cache while it computes: memory that is needed next.
  const char* ahead = nullptr;
  int64_t ahead_bytes = 0;
};

struct GemmKernels {
  int64_t strip, panel;  // how many of `streamed` and of `packed` the innermost tile takes
  int64_t depths;        // how many depths a packed entry holds, in as many bytes as out's
  // Packs depths [k0, k1) of panel j to `at`: panel x panel_depth(k1 - k0) entries.
  void (*pack)(const GemmJob&, int64_t k0, int64_t k1, int64_t j, void* at);
  // Adds depths [k0, k1) to out's entries of streamed [i0, i1) and panels [j0, j1); packed panel j
  // lies at packed + j * panel * panel_depth(k1 - k0). k0 is a multiple of 256.
  void (*tile)(const GemmJob&, int64_t k0, int64_t k1, int64_t i0, int64_t i1, int64_t j0,
               int64_t j1, const void* packed);

  int64_t panel_depth(int64_t n) const { return (n + depths - 1) / depths; }
};

// For float and for double, and for pairs of bfloat16 (where the instruction set has none, those
// for float); slim: where the packed side is within one vector.
struct GemmTable {
  GemmKernels plain, plain_wide, slim, slim_wide, pairs, slim_pairs;

  const GemmKernels& of(bool wide, int64_t packed) const {
    const GemmKernels& thin = wide ? slim_wide : slim;
    return packed <= thin.panel ? thin : wide ? plain_wide : plain;
  }
  const GemmKernels& of_pairs(int64_t packed) const {
    return packed <= slim_pairs.panel ? slim_pairs : pairs;
  }
};

enum class Outcome;

// Strides in bytes.
struct Matrix {
  const char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
};

// out (rows of a, columns of b) = a b, or += where `accumulate`; `bias`, if given, is added.
// `may_round`: float beside bfloat16 need not keep more than that has (e above).
Outcome multiply(const Matrix& a, const Matrix& b, char* out, int64_t out_stride, bool accumulate,
                 const void* bias, bool may_round, bool (*poll)(void*), void* poll_context);

}  // namespace crossent
