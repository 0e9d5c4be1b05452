#include "simt/tensor_core.h"

#include <cstring>

#include "simt/executor.h"

namespace simt {
namespace {

// Eight floats: a row of B, C or D. The compiler splits it where registers are narrower; sums are
// the same everywhere, as the products of these formats are exact in float.
using Row = float __attribute__((vector_size(32)));

// The lanes 4g..4g+3 hold, in one register, the values of row (of A) or column (of B) g.
template <Product product>
void widen(const std::uint32_t* words, float* values) {
  if constexpr (product == Product::kTf32) {
    // The hardware does not look at the lower 13 bits.
    for (int i = 0; i < 4; ++i) values[i] = std::bit_cast<float>(words[i] & 0xffffe000);
  } else {
    std::uint16_t halves[8];
    std::memcpy(halves, words, sizeof(halves));
    for (int i = 0; i < 8; ++i) {
      values[i] = product == Product::kBf16 ? bf16_to_float(halves[i]) : half_to_float(halves[i]);
    }
  }
}

// Words 0..3: d. 4..7: a. 8, 9: b. Each product is added to d in the order of the contraction.
template <Product product>
__attribute__((always_inline)) inline void multiply_add_words(std::uint32_t (&words)[10][32]) {
  constexpr int kDepth = product == Product::kTf32 ? 8 : 16;
  constexpr int kHalf = kDepth / 2;  // what one register of four lanes holds
  float a[16][kDepth], columns[8][kDepth];
  Row b[kDepth], d[16];
  for (int g = 0; g < 8; ++g) {
    widen<product>(&words[4][4 * g], &a[g][0]);
    widen<product>(&words[5][4 * g], &a[g + 8][0]);
    widen<product>(&words[6][4 * g], &a[g][kHalf]);
    widen<product>(&words[7][4 * g], &a[g + 8][kHalf]);
    widen<product>(&words[8][4 * g], &columns[g][0]);
    widen<product>(&words[9][4 * g], &columns[g][kHalf]);
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int g = 0; g < 8; ++g) b[k][g] = columns[g][k];
  }
  for (int row = 0; row < 16; ++row) {
    const int first = row / 8 * 2;
    for (int column = 0; column < 8; ++column) {
      d[row][column] = std::bit_cast<float>(words[first + column % 2][row % 8 * 4 + column / 2]);
    }
  }
  for (int first = 0; first < 16; first += 8) {
    for (int k = 0; k < kDepth; ++k) {
      for (int row = first; row < first + 8; ++row) d[row] += a[row][k] * b[k];
    }
  }
  for (int row = 0; row < 16; ++row) {
    const int first = row / 8 * 2;
    for (int column = 0; column < 8; ++column) {
      words[first + column % 2][row % 8 * 4 + column / 2] =
          std::bit_cast<std::uint32_t>(static_cast<float>(d[row][column]));
    }
  }
}

#ifdef __x86_64__
template <Product product>
__attribute__((target("avx2"))) void multiply_add_avx2(std::uint32_t (&words)[10][32]) {
  multiply_add_words<product>(words);
}
#endif

template <Product product>
void execute_product(Warp& warp, std::uint32_t /*mask*/) {
#ifdef __x86_64__
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return multiply_add_avx2<product>(warp.words);
#endif
  multiply_add_words<product>(warp.words);
}

// Words 0, 1: the address of a row; then words 0..3: the registers.
template <bool kTransposed>
void execute_load(Warp& warp, std::uint32_t /*mask*/) {
  std::uint16_t values[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const std::uint64_t bits = warp.words[0][lane] | static_cast<std::uint64_t>(warp.words[1][lane])
                                                         << 32;
    const auto* row = reinterpret_cast<const void*>(bits);
    Thread& thread = warp.threads[lane];
    if (bits % 16 != 0) {
      active_executor->fail(
          thread, "misaligned",
          "calls ldmatrix" + describe(thread.site) + " with a row that is not aligned to 16 bytes");
    }
    active_executor->touch(thread, row, 16, Access::kRead, "reads, by ldmatrix,");
    std::memcpy(values[lane], row, 16);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto& rows = *reinterpret_cast<const std::uint16_t (*)[8][8]>(values[matrix * 8]);
    if constexpr (kTransposed) {
      for (int lane = 0; lane < 32; ++lane) {
        const std::uint32_t low = rows[lane % 4 * 2][lane / 4];
        const std::uint32_t high = rows[lane % 4 * 2 + 1][lane / 4];
        warp.words[matrix][lane] = low | high << 16;
      }
    } else {
      // Lanes 4g..4g+3 hold row g, in its order.
      std::memcpy(warp.words[matrix], rows, sizeof(rows));
    }
  }
}

constexpr Collective kLoad = {"ldmatrix", true, execute_load<false>};
constexpr Collective kLoadTransposed = {"ldmatrix.trans", true, execute_load<true>};
constexpr Collective kProducts[] = {
    {"mma (bf16)", true, execute_product<Product::kBf16>},
    {"mma (fp16)", true, execute_product<Product::kFp16>},
    {"mma (tf32)", true, execute_product<Product::kTf32>},
};

}  // namespace

uint4 load_matrices_of_warp(const void* shared_row, bool transposed, Site site) {
  const Thread& thread = active_executor->current();
  auto& words = thread.warp->words;
  const auto bits = reinterpret_cast<std::uint64_t>(shared_row);
  words[0][thread.lane] = static_cast<std::uint32_t>(bits);
  words[1][thread.lane] = static_cast<std::uint32_t>(bits >> 32);
  active_executor->join(transposed ? kLoadTransposed : kLoad, 0xffffffff, site);
  return {words[0][thread.lane], words[1][thread.lane], words[2][thread.lane],
          words[3][thread.lane]};
}

float4 multiply_add_of_warp(Product product, float d0, float d1, float d2, float d3,
                            std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                            std::uint32_t b0, std::uint32_t b1, Site site) {
  const Thread& thread = active_executor->current();
  auto& words = thread.warp->words;
  const float d[4] = {d0, d1, d2, d3};
  const std::uint32_t operands[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 4; ++i) words[i][thread.lane] = std::bit_cast<std::uint32_t>(d[i]);
  for (int i = 0; i < 6; ++i) words[4 + i][thread.lane] = operands[i];
  active_executor->join(kProducts[static_cast<int>(product)], 0xffffffff, site);
  return {std::bit_cast<float>(words[0][thread.lane]), std::bit_cast<float>(words[1][thread.lane]),
          std::bit_cast<float>(words[2][thread.lane]), std::bit_cast<float>(words[3][thread.lane])};
}

}  // namespace simt
