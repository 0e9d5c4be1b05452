// main(NAME): runs one case, prints "passed" or in one line what is wrong.

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases/products.cuh"
#include "cases/rules.cuh"

using namespace cases;

namespace {

void require(bool holds, const std::string& claim) {
  if (!holds) throw std::runtime_error("not so: " + claim);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Arguments... arguments) {
  require(simt::launch(kernel, grid, block, shared_bytes, nullptr, arguments...) == cudaSuccess,
          "the launch succeeds");
}

// Multiples of 1/4 in -2..2: every format and every sum below holds them exactly.
template <typename T>
std::vector<T> small_values(int num, unsigned seed) {
  std::vector<T> values(num);
  for (T& value : values) {
    seed = seed * 1664525 + 1013904223;
    value = T(static_cast<float>(seed >> 16 & 15) / 4 - 2);
  }
  return values;
}

template <typename T, bool kTransposed, Fault kFault = Fault::kNone>
void product() {
  constexpr int kRows = 64, kColumns = 128, kDepth = 192;
  const auto a = small_values<T>(kRows * kDepth, 1), b = small_values<T>(kColumns * kDepth, 2);
  std::vector<float> c(kRows * kColumns);
  launch(multiply<T, kTransposed, kFault>, {kColumns / kTile, kRows / kTile}, 128,
         4 * kTileBytes<T>, a.data(), b.data(), c.data(), kRows, kColumns, kDepth);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += static_cast<float>(a[row * kDepth + k]) *
               static_cast<float>(kTransposed ? b[k * kColumns + column] : b[column * kDepth + k]);
      }
      require(c[row * kColumns + column] == sum,
              "the product is right at " + std::to_string(row) + ", " + std::to_string(column));
    }
  }
}

template <bool kBroken>
void block_sums() {
  constexpr int kNum = 1000, kThreads = 256;
  const auto values = small_values<float>(kNum, 3);
  std::vector<float> sums(4);
  launch(sum_blocks<kBroken>, 4, kThreads, kThreads / 32 * 4, values.data(), sums.data(), kNum);
  for (int block = 0; block < 4; ++block) {
    float sum = 0;
    for (int i = block * kThreads; i < std::min(kNum, (block + 1) * kThreads); ++i)
      sum += values[i];
    require(sums[block] == sum, "the sums are right");
  }
}

template <CopyFault kFault>
void copies() {
  constexpr int kNum = 1003, kPadded = 1024, kThreads = 64;
  const auto in = small_values<float>(kNum + 1, 4);
  std::vector<float> out(kPadded, -1.0f);
  launch(copy_through<kFault>, 1, kThreads, 2 * kThreads * 16, in.data(), out.data(), kNum,
         kPadded);
  for (int i = 0; i < kPadded; ++i) require(out[i] == (i < kNum ? in[i] : 0), "the copy is right");
}

template <bool kBroken>
void warp_exchange() {
  std::vector<float> out(64);
  launch(exchange_in_warp<kBroken>, 1, 64, 64 * 4, out.data());
  for (int i = 0; i < 64; ++i) require(out[i] == (i ^ 1), "neighbours are exchanged");
}

template <bool kBroken>
void long_loops() {
  std::vector<int> out(64);
  launch(many_barriers<kBroken>, 1, 64, 64 * 4, out.data(), 2100, 600);
  for (const int value : out) require(value == 2700, "no turn is lost");
}

template <bool kBroken>
void counts() {
  std::vector<int> bins(8);
  launch(count<kBroken>, 10, 64, 8 * 4, bins.data());
  for (const int bin : bins) require(bin == 80, "every thread is counted");
}

template <bool kBroken>
void rows() {
  std::vector<float> out(4 * 32);
  launch(write_own_row<kBroken>, 4, 32, 0, out.data());
  for (const float value : out) require(value == 1, "all rows are written");
}

void blocks_that_read_each_other() {
  std::vector<float> out(2 * 4 * 32);
  launch(read_other_block, 4, 32, 0, out.data());
}

template <CollectiveFault kFault>
void warps() {
  std::vector<float> out(32);
  launch(diverge_in_warp<kFault>, 1, 32, 16, out.data());
}

template <MemoryFault kFault>
void memory() {
  std::vector<float> out(64);
  launch(touch_wrongly<kFault>, 1, 64, 64 * 4, out.data());
}

void votes() {
  std::vector<unsigned> out(48);
  launch(vote, 1, 48, 0, out.data());
  unsigned ballots[2] = {};
  for (unsigned i = 0; i < 48; ++i) ballots[i / 32] |= (i % 3 == 0 ? 1u : 0u) << i % 32;
  for (unsigned i = 0; i < 48; ++i) {
    require(out[i] == (ballots[i / 32] ^ (i % 32 < 8 ? 1u << 30 : 0)), "votes are counted");
  }
}

void indices() {
  std::vector<unsigned> out(2 * 3 * 4 * 40);
  launch(where_am_i, {2, 3, 4}, {4, 5, 2}, 0, out.data());
  for (unsigned i = 0; i < out.size(); ++i) require(out[i] == i, "every thread knows its place");
}

// Against the nearest of all values of the format, found by search.
void numbers() {
  const auto nearest = [](float x, auto widen, float largest) {
    std::uint16_t best = 0;
    for (unsigned step = 1u << 14; step > 0; step /= 2) {
      const auto next = static_cast<std::uint16_t>(best + step);
      if (next <= 0x7c00u * 2 && widen(next) <= std::min(std::fabs(x), largest)) best = next;
    }
    const double low = widen(best), high = widen(static_cast<std::uint16_t>(best + 1));
    const double middle =
        (low +
         (std::isinf(high) ? low + (low - widen(static_cast<std::uint16_t>(best - 1))) : high)) /
        2;
    const double size = std::fabs(x);
    if (size > middle || (size == middle && best % 2 == 1)) ++best;
    return static_cast<std::uint16_t>(best | (std::signbit(x) ? 0x8000 : 0));
  };
  for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 99991) {
    for (const std::uint32_t low : {0u, 0x1000u, 0x8000u, 0x3000u, 0x18000u}) {
      const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(bits & 0xfffe0000) | low |
                                          static_cast<std::uint32_t>(bits & 1));
      if (!std::isfinite(x)) continue;
      require(simt::float_to_half(x) == nearest(x, simt::half_to_float, 65504.0f),
              "float to half rounds " + std::to_string(x));
      require(simt::float_to_bf16(x) == nearest(x, simt::bf16_to_float, 0x1.fep127f),
              "float to bf16 rounds " + std::to_string(x));
      const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 10);
      if (std::fabs(x) < 0x1.ffcp127f && x != 0) {
        require(
            std::bit_cast<float>(simt::to_tf32(x)) == static_cast<float>(std::round(x / ulp) * ulp),
            "float to tf32 rounds " + std::to_string(x));
      }
    }
  }
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    const float x = simt::half_to_float(half);
    if (exponent < 31) require(x == (half >> 15 ? -size : size), "half to float is exact");
    if (exponent == 31) require(mantissa == 0 ? std::isinf(x) : std::isnan(x), "inf and NaN stay");
  }
  require(simt::float_to_half(NAN) == 0x7fff && simt::float_to_bf16(NAN) == 0x7fff, "NaN is one");
  require(simt::float_to_half(INFINITY) == 0x7c00 && simt::float_to_bf16(-INFINITY) == 0xff80,
          "infinity stays");
  require(simt::pack<__half>(1.0f, -2.0f) == 0xc0003c00, "the first value is the lower half");
  require(simt::pack<__nv_bfloat16>(1.0f, -2.0f) == 0xc0003f80, "the first is the lower half");
  require(simt::exp2_approx(-127.0f) == 0 && simt::exp2_approx(-126.0f) == 0x1p-126f &&
              simt::exp2_approx(-INFINITY) == 0 && std::isnan(simt::exp2_approx(NAN)),
          "subnormal powers become 0");
}

// The hardware ignores the lower 13 bits of an operand that was not rounded.
__global__ void multiply_unrounded(float* out) {
  float d[4] = {};
  const std::uint32_t one = 0x3f801fff;
  const std::uint32_t a[4] = {one, one, one, one};
  device::multiply_add_tf32(d, a, one, one);
  out[threadIdx.x] = d[0];
}

void unrounded_tf32() {
  std::vector<float> out(32);
  launch(multiply_unrounded, 1, 32, 0, out.data());
  for (const float value : out) require(value == 8.0f, "the lower bits do not count");
}

void limits() {
  const auto error = [](dim3 grid, dim3 block, std::size_t shared_bytes) {
    return simt::launch(where_am_i, grid, block, shared_bytes, nullptr, nullptr);
  };
  require(error(1, 1025, 0) == cudaErrorInvalidConfiguration, "1024 threads are the most");
  require(error(1, {32, 32, 2}, 0) == cudaErrorInvalidConfiguration, "in all dimensions together");
  require(error(1, 0, 0) == cudaErrorInvalidConfiguration, "a block is not empty");
  require(error(0, 1, 0) == cudaErrorInvalidConfiguration, "a grid is not empty");
  require(error({1, 65536}, 1, 0) == cudaErrorInvalidConfiguration, "65535 is the most in y");
  require(error({1, 1, 65536}, 1, 0) == cudaErrorInvalidConfiguration, "65535 is the most in z");
  require(error(1u << 31, 1, 0) == cudaErrorInvalidConfiguration, "2^31 - 1 is the most in x");
  require(error(1, 1, 227 * 1024 + 1) == cudaErrorInvalidValue, "227 KiB are the most");
}

void past_the_end() {
  std::vector<float> in(32), out(32);
  launch(read_past_end<float>, 1, 32, 0, in.data(), out.data(), 32);
}

void copy_past_the_end() {
  std::vector<float> in(32);
  launch(copy_past_end, 1, 32, 32 * 16, in.data(), 32);
}

using Bf16 = __nv_bfloat16;
using Half = __half;

const std::map<std::string, std::function<void()>> kCases = {
    {"block_sums", block_sums<false>},
    {"copies", copies<CopyFault::kNone>},
    {"product_bf16", product<Bf16, false>},
    {"product_bf16_transposed", product<Bf16, true>},
    {"product_fp16", product<Half, false>},
    {"product_fp16_transposed", product<Half, true>},
    {"product_tf32", product<float, false>},
    {"product_tf32_transposed", product<float, true>},
    {"unrounded_tf32", unrounded_tf32},
    {"warp_exchange", warp_exchange<false>},
    {"many_barriers", long_loops<false>},
    {"atomics", counts<false>},
    {"rows", rows<false>},
    {"votes", votes},
    {"indices", indices},
    {"numbers", numbers},
    {"limits", limits},

    {"sums_without_barrier", block_sums<true>},
    {"product_without_barrier_before_read", product<Bf16, false, Fault::kNoBarrierBeforeRead>},
    {"product_without_barrier_before_overwrite",
     product<Bf16, false, Fault::kNoBarrierBeforeOverwrite>},
    {"product_without_wait", product<Half, true, Fault::kNoWait>},
    {"product_with_swapped_b", product<Bf16, true, Fault::kSwappedB>},
    {"product_with_misaligned_copy", product<Bf16, false, Fault::kMisalignedCopy>},
    {"product_with_misaligned_row", product<Bf16, false, Fault::kMisalignedRow>},
    {"product_with_one_lane_too_few", product<Bf16, false, Fault::kOneLaneTooFew>},
    {"copies_without_wait", copies<CopyFault::kNoWait>},
    {"copies_without_wait_at_the_end", copies<CopyFault::kNoWaitAtAll>},
    {"copies_without_commit", copies<CopyFault::kNoCommit>},
    {"copies_without_barrier", copies<CopyFault::kNoBarrier>},
    {"warp_exchange_without_barrier", warp_exchange<true>},
    {"many_barriers_but_one", long_loops<true>},
    {"atomic_and_plain", counts<true>},
    {"rows_of_other_blocks", rows<true>},
    {"blocks_that_read_each_other", blocks_that_read_each_other},
    {"barrier_after_exit", [] { launch(diverge_at_barrier<BarrierFault::kExited>, 1, 64, 0); }},
    {"barrier_in_two_places",
     [] { launch(diverge_at_barrier<BarrierFault::kTwoPlaces>, 1, 64, 0); }},
    {"shuffle_and_barrier", warps<CollectiveFault::kBarrier>},
    {"shuffle_after_exit", warps<CollectiveFault::kExited>},
    {"shuffle_and_vote", warps<CollectiveFault::kTwoKinds>},
    {"ldmatrix_in_two_places", warps<CollectiveFault::kTwoPlaces>},
    {"shuffle_outside_mask", warps<CollectiveFault::kMask>},
    {"shuffle_from_outside_mask", warps<CollectiveFault::kSource>},
    {"shared_read_past_the_end", memory<MemoryFault::kReadPastEnd>},
    {"shared_write_before_the_start", memory<MemoryFault::kWriteBefore>},
    {"misaligned_vector", memory<MemoryFault::kMisaligned>},
    {"trap", memory<MemoryFault::kTrap>},
    {"global_read_past_the_end", past_the_end},
    {"copy_past_the_end", copy_past_the_end},
};

}  // namespace

int main(int num_arguments, char** arguments) {
  const auto found = kCases.find(num_arguments == 2 ? arguments[1] : "");
  if (found == kCases.end()) {
    std::printf("one of:\n");
    for (const auto& [name, run] : kCases) std::printf("  %s\n", name.c_str());
    return 2;
  }
  try {
    found->second();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("passed\n");
}
