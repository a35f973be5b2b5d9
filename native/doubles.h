// A row of any dtype and any stride, as doubles and back.
#pragma once

#include <type_traits>

#include "rows.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

template <class S>
void read_as(const View& view, int64_t i, double* to, int64_t step) {
  using Type = typename S::Type;
  constexpr int kMany = Lanes<typename S::T>::n;
  const char* at = view.row(i);
  const int64_t V = view.classes;
  if constexpr (std::is_same_v<Type, typename S::T>) {
    for (int64_t j = 0; j < V; j++)
      to[j * step] = *reinterpret_cast<const Type*>(at + j * view.class_stride);
    return;
  }
  alignas(kBytes) Type part[kMany] = {};
  for (int64_t j = 0; j < V; j += kMany) {
    const int n = V - j < kMany ? static_cast<int>(V - j) : kMany;
    for (int k = 0; k < n; k++)
      part[k] = *reinterpret_cast<const Type*>(at + (j + k) * view.class_stride);
    const auto x = S::load(part);
    for (int k = 0; k < n; k++) to[(j + k) * step] = x[k];
  }
}

template <class S>
void write_as(const View& view, int64_t i, const double* from, int64_t step) {
  using Type = typename S::Type;
  using T = typename S::T;
  constexpr int kMany = Lanes<T>::n;
  char* at = view.row(i);
  const int64_t V = view.classes;
  if constexpr (std::is_same_v<Type, T>) {
    for (int64_t j = 0; j < V; j++)
      *reinterpret_cast<Type*>(at + j * view.class_stride) = static_cast<T>(from[j * step]);
    return;
  }
  alignas(kBytes) T lanes[kMany] = {};
  alignas(kBytes) Type part[kMany];
  for (int64_t j = 0; j < V; j += kMany) {
    const int n = V - j < kMany ? static_cast<int>(V - j) : kMany;
    for (int k = 0; k < n; k++) lanes[k] = static_cast<T>(from[(j + k) * step]);
    S::store(part, load(lanes));
    for (int k = 0; k < n; k++)
      *reinterpret_cast<Type*>(at + (j + k) * view.class_stride) = part[k];
  }
}

// Row i to every step-th double.
inline void read_row(const View& view, int64_t i, double* to, int64_t step = 1) {
  switch (view.dtype) {
    case Dtype::kFloat16:
      return read_as<Stored<Dtype::kFloat16>>(view, i, to, step);
    case Dtype::kBFloat16:
      return read_as<Stored<Dtype::kBFloat16>>(view, i, to, step);
    case Dtype::kFloat32:
      return read_as<Stored<Dtype::kFloat32>>(view, i, to, step);
    case Dtype::kFloat64:
      return read_as<Stored<Dtype::kFloat64>>(view, i, to, step);
  }
}

inline void write_row(const View& view, int64_t i, const double* from, int64_t step = 1) {
  switch (view.dtype) {
    case Dtype::kFloat16:
      return write_as<Stored<Dtype::kFloat16>>(view, i, from, step);
    case Dtype::kBFloat16:
      return write_as<Stored<Dtype::kBFloat16>>(view, i, from, step);
    case Dtype::kFloat32:
      return write_as<Stored<Dtype::kFloat32>>(view, i, from, step);
    case Dtype::kFloat64:
      return write_as<Stored<Dtype::kFloat64>>(view, i, from, step);
  }
}

}  // namespace
}  // namespace CROSSENT_ISA
}  // namespace crossent
