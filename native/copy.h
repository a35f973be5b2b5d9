// Plain copies on the pool's threads: what `crossent bench` holds the kernels against.
#pragma once

#include <cstdint>

namespace crossent {

// Copies n bytes between two places that do not overlap. With `streaming` the stores go past the
// caches, where the machine has such stores: the fastest copy of what the caches do not hold.
void copy_bytes(void* out, const void* source, int64_t n, bool streaming);

}  // namespace crossent
