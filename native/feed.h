// Rows as contiguous memory: in place where the class axis is contiguous, else copied in and out a
// few rows at a time (neighbouring rows share cache lines).
#pragma once

#include <type_traits>

#include "rows.h"
#include "simd.h"
#include "transpose.h"

namespace crossent {
namespace CROSSENT_ISA {

template <class Type>
class Feed {
 public:
  // Uses the scratch slots `slot` and `slot + 1`.
  Feed(const RowJob& job, int slot)
      : in_(job.logits),
        out_(job.out),
        slot_(slot),
        copies_in_(!in_.contiguous_rows()),
        copies_out_(out_.data && !out_.contiguous_rows()) {
    const int64_t fit = kCopyBytes / (in_.classes * int64_t{sizeof(Type)});
    group_ = !(copies_in_ || copies_out_) ? kGroup : fit < 1 ? 1 : fit < kGroup ? fit : kGroup;
  }

  // False: no memory.
  bool prepare() {
    const int64_t bytes = group_ * in_.classes * int64_t{sizeof(Type)};
    if (copies_in_) in_copy_ = static_cast<Type*>(scratch(slot_, bytes));
    if (copies_out_) out_copy_ = static_cast<Type*>(scratch(slot_ + 1, bytes));
    return (in_copy_ || !copies_in_) && (out_copy_ || !copies_out_);
  }

  // Makes the rows [i, next()) ready.
  void read(int64_t i, int64_t end) {
    begin_ = i;
    next_ = i + group_ < end ? i + group_ : end;
    for (int k = 0; k < kGroup; k++) left_[k] = false;
    if (copies_in_) each<true>(in_, in_copy_);
  }
  int64_t next() const { return next_; }

  const Type* in(int64_t row) const {
    return copies_in_ ? in_copy_ + (row - begin_) * in_.classes
                      : reinterpret_cast<const Type*>(in_.row(row));
  }
  // The start of the row `by` rows on, for fetching; of this one where there is none.
  const Type* ahead(int64_t row, int64_t by) const {
    const bool there = !copies_in_ && row + by < in_.outer * in_.inner;
    return there ? reinterpret_cast<const Type*>(in_.row(row + by)) : in(row);
  }
  Type* out(int64_t row) const {
    if (!out_.data) return nullptr;
    return copies_out_ ? out_copy_ + (row - begin_) * in_.classes
                       : reinterpret_cast<Type*>(out_.row(row));
  }
  // The row's output has been written by somebody else.
  void leave(int64_t row) { left_[row - begin_] = true; }

  void write() {
    if (copies_out_) each<false>(out_, out_copy_);
  }

 private:
  static constexpr int kGroup = 16;
  static constexpr int64_t kCopyBytes = 1 << 19;

  template <bool kIn>
  void each(const View& view, Type* copy) const {
    char* rows[kGroup];
    const int n = static_cast<int>(next_ - begin_);
    for (int k = 0; k < n; k++) rows[k] = view.row(begin_ + k);
    const int64_t done = squares<kIn>(view, rows, n, copy);
    for (int64_t j = done; j < in_.classes; j++)
      for (int k = 0; k < n; k++) {
        if (left_[k]) continue;
        auto& there = *reinterpret_cast<Type*>(rows[k] + j * view.class_stride);
        auto& mine = copy[k * in_.classes + j];
        kIn ? mine = there : there = mine;
      }
  }

  // Floats of rows that lie side by side, a square at a time. Returns how many classes are done.
  template <bool kIn>
  int64_t squares(const View& view, char* const* rows, int n, Type* copy) const {
    int64_t j = 0;
    if constexpr (std::is_same_v<Type, float>) {
      constexpr int L = Lanes<float>::n;
      bool beside = n == kGroup;
      for (int k = 1; k < n; k++) beside &= rows[k] - rows[k - 1] == int64_t{sizeof(float)};
      for (int k = 0; k < n; k++) beside &= !left_[k];
      for (; beside && j + L <= in_.classes; j += L)
        for (int k = 0; k < n; k += L) {
          F x[L];
          for (int q = 0; q < L; q++)
            x[q] = kIn ? load(reinterpret_cast<float*>(rows[k] + (j + q) * view.class_stride))
                       : load(copy + (k + q) * in_.classes + j);
          transpose(x);
          for (int q = 0; q < L; q++)
            store(kIn ? copy + (k + q) * in_.classes + j
                      : reinterpret_cast<float*>(rows[k] + (j + q) * view.class_stride),
                  x[q]);
        }
    }
    return j;
  }

  const View &in_, &out_;
  int slot_;
  bool copies_in_, copies_out_;
  int64_t group_ = 1, begin_ = 0, next_ = 0;
  Type *in_copy_ = nullptr, *out_copy_ = nullptr;
  bool left_[kGroup] = {};
};

}  // namespace CROSSENT_ISA
}  // namespace crossent
