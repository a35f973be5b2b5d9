// Jobs that must give the same bits alone and among threads.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "../parallel.h"

namespace crossent {

// Four threads share the jobs out and set the number of threads all the while. Returns how many
// gave other bits than `alone`. Work has a `name` and serve(), which returns its bits.
template <class Work>
int race(const std::vector<Work*>& works, const std::vector<std::string>& alone) {
  std::atomic<size_t> next{0};
  std::atomic<int> wrong{0};
  const auto serve = [&](int number) {
    for (size_t k; (k = next++) < works.size();) {
      set_num_threads(1 + (number + static_cast<int>(k)) % 4);
      if (works[k]->serve() != alone[k]) {
        std::fprintf(stderr, "other bits among threads: %s\n", works[k]->name.c_str());
        wrong++;
      }
    }
  };
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; number++) threads.emplace_back(serve, number);
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

}  // namespace crossent
