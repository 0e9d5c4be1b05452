// negatives on CUDA (formula and shapes: negatives.h; how a word becomes an item: draw.h).
//
// One thread makes the four draws of one Philox block of one row, without a word to any other
// thread. A draw reads 16 bytes of the alias table at random, and searches the row's exclusions in
// log2 of their number steps; it writes 12 bytes. A thread a row comes first: it checks and weighs
// what the row excludes.

#include "device/cuda.cuh"
#include "negatives/negatives_device.h"

namespace torchrec_pt::device {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ std::int64_t thread_number() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads)
    negatives_rows(NegativesOnDevice problem, NegativesRows rows) {
  const std::int64_t r = thread_number();
  if (r >= problem.num_rows) return;
  TORCHREC_PT_DEVICE_ASSERT(problem.rows[r] >= 0 && problem.rows[r] < std::int64_t{1} << 32);
  const std::int64_t* masses = problem.distribution.mass;
  std::uint64_t mass = problem.total_mass;
  if (problem.exclude_offsets) {
    const std::int64_t begin = problem.exclude_offsets[r];
    const std::int64_t end = problem.exclude_offsets[r + 1];
    TORCHREC_PT_DEVICE_ASSERT(0 <= begin && begin <= end && end <= problem.num_excluded);
    std::int64_t last = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t item = problem.exclude[i];
      TORCHREC_PT_DEVICE_ASSERT(last < item && item < problem.distribution.num_items);
      mass -= masses ? static_cast<std::uint64_t>(masses[item]) : 1;
      last = item;
    }
    TORCHREC_PT_DEVICE_ASSERT(mass > 0 && "some item must be left to draw");
  }
  const double total = problem.distribution.columns ? static_cast<double>(problem.total_mass) : 1;
  const double draws = static_cast<double>(problem.num_draws);
  rows.log_scale[r] = static_cast<float>(log(draws * total / static_cast<double>(mass)));
  rows.mass_left[r] = mass;
}

__global__ void __launch_bounds__(kThreads)
    negatives_draw(NegativesOnDevice problem, NegativesRows rows, std::int64_t* items,
                   float* log_q) {
  const std::int64_t blocks_per_row = (problem.num_draws + 3) / 4;
  const std::int64_t thread = thread_number();
  const std::int64_t r = thread / blocks_per_row;
  if (r >= problem.num_rows) return;
  const auto block = static_cast<std::uint32_t>(thread % blocks_per_row);
  const auto row = static_cast<std::uint32_t>(problem.rows[r]);
  const ItemDistribution& distribution = problem.distribution;

  Exclusions excluded{problem.exclude, 0, rows.mass_left[r]};
  if (problem.exclude_offsets) {
    excluded.items += problem.exclude_offsets[r];
    excluded.size = problem.exclude_offsets[r + 1] - problem.exclude_offsets[r];
  }

  const PhiloxWords columns = philox({row, block, 0, kColumn}, problem.key);
  const PhiloxWords coins =
      distribution.columns ? philox({row, block, 0, kCoin}, problem.key) : PhiloxWords{};
  const std::int64_t first = std::int64_t{block} * 4;
  for (std::uint32_t i = 0; i < 4 && first + i < problem.num_draws; ++i) {
    const std::uint64_t product = distribution.product(columns.at(i));
    Drawn drawn = distribution.item(static_cast<std::uint32_t>(product >> 32), coins.at(i));
    if (distribution.refuses(product) || excluded.contains(drawn.item)) {
      drawn = draw_again(distribution, {problem.key, row, 4 * block + i}, excluded);
    }
    const std::int64_t at = r * problem.num_draws + first + i;
    items[at] = drawn.item;
    if (log_q) log_q[at] = drawn.log_q + rows.log_scale[r];
  }
}

__global__ void __launch_bounds__(kThreads)
    philox_words(const std::int64_t* counters, const std::int64_t* key, std::int64_t num,
                 std::int64_t* words) {
  const std::int64_t n = thread_number();
  if (n >= num) return;
  const auto word = [&](int i) { return static_cast<std::uint32_t>(counters[4 * n + i]); };
  const PhiloxKey key_words{static_cast<std::uint32_t>(key[0]), static_cast<std::uint32_t>(key[1])};
  const PhiloxWords block = philox({word(0), word(1), word(2), word(3)}, key_words);
  for (std::uint32_t i = 0; i < 4; ++i) words[4 * n + i] = block.at(i);
}

dim3 one_thread_each(std::int64_t num) {
  return dim3(static_cast<unsigned>((num + kThreads - 1) / kThreads));
}

}  // namespace

int launch_negatives_rows(const NegativesOnDevice& problem, NegativesRows rows,
                          CUstream_st* stream) {
  return launch(negatives_rows, one_thread_each(problem.num_rows), dim3(kThreads), 0, stream,
                problem, rows);
}

int launch_negatives_draw(const NegativesOnDevice& problem, NegativesRows rows, std::int64_t* items,
                          float* log_q, CUstream_st* stream) {
  const std::int64_t num_blocks = problem.num_rows * ((problem.num_draws + 3) / 4);
  return launch(negatives_draw, one_thread_each(num_blocks), dim3(kThreads), 0, stream, problem,
                rows, items, log_q);
}

int launch_philox(const std::int64_t* counters, const std::int64_t* key, std::int64_t num,
                  std::int64_t* words, CUstream_st* stream) {
  return launch(philox_words, one_thread_each(num), dim3(kThreads), 0, stream, counters, key, num,
                words);
}

}  // namespace torchrec_pt::device
