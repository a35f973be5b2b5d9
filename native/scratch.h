// One thread's memory for kernels (rows.h: scratch), who may use it, and the memory of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace crossent {

// Small slots stay for the next call; a large one goes with its thread's task (trim_scratch), so
// that one huge row does not keep its memory for ever.
struct Scratch {
  static constexpr int kSlots = 12;
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
  } slots[kSlots];

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { trim(0); }
  void* get(int slot, int64_t bytes);
  void trim(int64_t keep);
};

// After each task.
void trim_scratch();

// A poll runs Python's signal handlers, and those may call us in the middle of a row: a run within
// a run has scratch of its own, so that what the outer one holds stays.
class OwnScratch {
 public:
  OwnScratch();
  ~OwnScratch();
  OwnScratch(const OwnScratch&) = delete;

 private:
  Scratch mine_;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;
// Aligned to 64 bytes, contents unspecified; null when there is none left.
Memory allocate(int64_t bytes);

}  // namespace crossent
