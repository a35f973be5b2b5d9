#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "rows.h"

namespace crossent {
namespace {

constexpr int64_t kKeep = int64_t{16} << 20;
thread_local Scratch thread_scratch;
thread_local int runs_under_way = 0;

}  // namespace

void* Scratch::get(int slot, int64_t bytes) {
  Slot& s = slots[slot];
  if (bytes <= s.bytes) return s.data;
  std::free(s.data);
  const int64_t whole = (bytes + 4095) / 4096 * 4096;
  s.data = std::aligned_alloc(4096, static_cast<size_t>(whole));
  s.bytes = s.data ? whole : 0;
  return s.data;
}

void Scratch::trim(int64_t keep) {
  for (Slot& s : slots)
    if (s.bytes > keep) {
      std::free(s.data);
      s = {};
    }
}

void* scratch(int slot, int64_t bytes) { return thread_scratch.get(slot, bytes); }
void trim_scratch() { thread_scratch.trim(kKeep); }

OwnScratch::OwnScratch() {
  if (runs_under_way++ > 0) std::swap(mine_.slots, thread_scratch.slots);
}
OwnScratch::~OwnScratch() {
  if (--runs_under_way > 0) std::swap(mine_.slots, thread_scratch.slots);
}

Memory allocate(int64_t bytes) {
  // aligned_alloc may refuse what is no multiple of the alignment (macOS does).
  const int64_t whole = (std::max<int64_t>(1, bytes) + 63) / 64 * 64;
  return Memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(whole))));
}

}  // namespace crossent
