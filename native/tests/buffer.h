// Arrays for the drivers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../rows.h"

namespace crossent {

// Where the numbers of a (rows, V) array lie.
enum class Layout { kPlain, kStrided, kInner, kReversed };

// An array of any dtype filled with float bits rounded to it, and its view.
struct Buffer {
  std::vector<char> bytes;
  View view;

  Buffer(Dtype dtype, int64_t rows, int64_t classes, Layout layout) {
    const int64_t size = size_of(dtype);
    const int64_t step = layout == Layout::kStrided ? 2 : 1;
    bytes.assign(static_cast<size_t>(rows * classes * step * size), 0);
    view.dtype = dtype;
    view.classes = classes;
    view.data = bytes.data();
    if (layout == Layout::kInner) {  // the class axis first
      view.outer = 1, view.inner = rows;
      view.outer_stride = rows * classes * size;
      view.class_stride = rows * size, view.inner_stride = size;
    } else {
      view.outer = rows, view.inner = 1;
      view.class_stride = step * size, view.inner_stride = size;
      view.outer_stride = classes * step * size;
    }
    if (layout == Layout::kReversed && !bytes.empty()) {
      view.data += (rows - 1) * view.outer_stride;
      view.outer_stride = -view.outer_stride;
    }
  }

  void fill(std::mt19937& random, double size) {
    std::normal_distribution<double> normal(0, size);
    const int64_t n = view.outer * view.inner;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < view.classes; j++) put(i, j, normal(random));
  }

  char* at(int64_t i, int64_t j) const { return view.row(i) + j * view.class_stride; }

  void put(int64_t i, int64_t j, double x) const {
    char* const at = this->at(i, j);
    const float f = static_cast<float>(x);
    if (view.dtype == Dtype::kFloat64) return void(std::memcpy(at, &x, 8));
    if (view.dtype == Dtype::kFloat32) return void(std::memcpy(at, &f, 4));
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16, cut off
    if (view.dtype == Dtype::kFloat16) {                // sign, exponent less 112, 10 bits
      const int exponent = static_cast<int>((bits >> 23) & 0xff) - 112;
      const int kept = exponent < 1 ? 0 : exponent > 30 ? 30 : exponent;
      half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (kept << 10) | (bits >> 13 & 0x3ff));
    }
    std::memcpy(at, &half, 2);
  }

  double get(int64_t i, int64_t j) const {
    double x;
    float f;
    uint16_t half;
    if (view.dtype == Dtype::kFloat64) return std::memcpy(&x, at(i, j), 8), x;
    if (view.dtype == Dtype::kFloat32) return std::memcpy(&f, at(i, j), 4), f;
    std::memcpy(&half, at(i, j), 2);
    if (view.dtype == Dtype::kBFloat16) {
      const uint32_t bits = uint32_t{half} << 16;
      return std::memcpy(&f, &bits, 4), f;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 31) {
      x = mantissa ? NAN : INFINITY;
    } else {
      x = std::ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    }
    return half & 0x8000 ? -x : x;
  }
};

}  // namespace crossent
