// A library as Python loads it: one kernel behind a C function.

#include <cstdio>
#include <stdexcept>

#include "cases/rules.cuh"

// Returns 0, or 1 with a line in `message`.
extern "C" int sum_blocks_of_256(const float* values, float* out, int num, int broken,
                                 char* message, std::size_t num_bytes) {
  const unsigned num_blocks = (num + 255) / 256;
  try {
    torchrec_pt::device::launch(broken ? cases::sum_blocks<true> : cases::sum_blocks<false>,
                                num_blocks, 256, 32, nullptr, values, out, num);
  } catch (const std::exception& error) {
    std::snprintf(message, num_bytes, "%s", error.what());
    return 1;
  }
  return 0;
}
