// The host's side of the kernels: which instruction set serves, and a job cut into tasks for
// threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rows.h"

namespace crossent {

// The instruction sets compiled in that this machine can run, the best one first.
std::vector<std::string> available_isas();
// The one in use: the best, or what set_isa chose.
std::string current_isa();
// False, and nothing changes, if `name` is not available.
bool set_isa(const std::string& name);

enum class Outcome { kDone, kCancelled, kOutOfMemory };

// Runs the job on the pool. The bits of the result depend neither on the number of threads nor on
// how the rows are cut. For `poll` see parallel.h.
Outcome run(RowJob job, bool (*poll)(void*), void* poll_context);

// The sum of n numbers, compensated, in their order.
double sum(const double* x, int64_t n);

}  // namespace crossent
