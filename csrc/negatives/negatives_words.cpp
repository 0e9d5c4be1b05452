#include "negatives/negatives_words.h"

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCHREC_PT_HAS_AVX2
#include <immintrin.h>
#endif

namespace torchrec_pt {
namespace {

constexpr std::uint32_t kBlocks = kWordGroup / 4;

void group_of_words(PhiloxKey key, std::uint32_t row, DrawStream stream, std::uint32_t first_block,
                    std::uint32_t* words) {
  for (std::uint32_t b = 0; b < kBlocks; ++b) {
    const PhiloxWords block = philox({row, first_block + b, 0, stream}, key);
    for (std::uint32_t i = 0; i < 4; ++i) words[4 * b + i] = block.at(i);
  }
}

#ifdef TORCHREC_PT_HAS_AVX2

// Philox with a word in each 64-bit lane, whose upper half is never looked at: one instruction
// gives both halves of a product. The compiler takes three from plain code.
__attribute__((target("avx2"))) void group_of_words_avx2(PhiloxKey key, std::uint32_t row,
                                                         DrawStream stream,
                                                         std::uint32_t first_block,
                                                         std::uint32_t* words) {
  constexpr int kVectors = kBlocks / 4;  // of 4 blocks
  const __m256i factor_x = _mm256_set1_epi64x(0xD2511F53);
  const __m256i factor_z = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i x[kVectors], y[kVectors], z[kVectors], w[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const __m256i first = _mm256_set1_epi64x(first_block + 4 * v);
    x[v] = _mm256_set1_epi64x(row);
    y[v] = _mm256_add_epi64(first, _mm256_set_epi64x(3, 2, 1, 0));
    z[v] = _mm256_setzero_si256();
    w[v] = _mm256_set1_epi64x(stream);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m256i low = _mm256_set1_epi64x(key.low);
    const __m256i high = _mm256_set1_epi64x(key.high);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i product_x = _mm256_mul_epu32(x[v], factor_x);
      const __m256i product_z = _mm256_mul_epu32(z[v], factor_z);
      x[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product_z, 32), y[v]), low);
      y[v] = product_z;
      z[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product_x, 32), w[v]), high);
      w[v] = product_x;
    }
    key.low += 0x9E3779B9;
    key.high += 0xBB67AE85;
  }
  for (int v = 0; v < kVectors; ++v) {
    // Words x and y, then z and w, of one block in one lane; then whole blocks.
    const __m256i xy = _mm256_blend_epi32(x[v], _mm256_slli_epi64(y[v], 32), 0xAA);
    const __m256i zw = _mm256_blend_epi32(z[v], _mm256_slli_epi64(w[v], 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(xy, zw);
    const __m256i odd = _mm256_unpackhi_epi64(xy, zw);
    auto* out = reinterpret_cast<__m256i*>(words + 16 * v);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}

#endif

auto best_group_of_words() {
#ifdef TORCHREC_PT_HAS_AVX2
  if (__builtin_cpu_supports("avx2")) return group_of_words_avx2;
#endif
  return group_of_words;
}

}  // namespace

void first_words(PhiloxKey key, std::uint32_t row, DrawStream stream, std::uint32_t first_draw,
                 std::int64_t num_words, std::uint32_t* words) {
  static const auto group = best_group_of_words();
  for (std::int64_t d = 0; d < num_words; d += kWordGroup) {
    group(key, row, stream, (first_draw + static_cast<std::uint32_t>(d)) / 4, words + d);
  }
}

TORCHREC_PT_CLONES bool to_columns(const ItemDistribution& distribution, const std::uint32_t* words,
                                   std::int64_t num_words, std::int64_t* columns) {
  const std::uint32_t num_items = distribution.num_items;
  const std::uint32_t remainder = distribution.remainder;
  std::uint32_t any_refused = 0;
#pragma omp simd reduction(| : any_refused)
  for (std::int64_t i = 0; i < num_words; ++i) {
    const std::uint64_t product = std::uint64_t{words[i]} * num_items;
    columns[i] = static_cast<std::int64_t>(product >> 32);
    any_refused |= static_cast<std::uint32_t>(product) < remainder;
  }
  return any_refused != 0;
}

void to_items(const ItemDistribution& distribution, const std::uint32_t* coins, std::int64_t size,
              float log_scale, std::int64_t* items, float* log_q) {
  constexpr std::int64_t kAhead = 64;
  const AliasColumn* columns = distribution.columns;
  for (std::int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) __builtin_prefetch(columns + items[i + kAhead]);
    const Drawn drawn = distribution.item(static_cast<std::uint32_t>(items[i]), coins[i]);
    items[i] = drawn.item;
    log_q[i] = drawn.log_q + log_scale;
  }
}

TORCHREC_PT_CLONES bool any_suspect(const ItemDistribution& distribution,
                                    const std::uint32_t* words, const std::int64_t* items,
                                    const std::uint32_t* bits, int shift) {
  const std::uint32_t num_items = distribution.num_items;
  const std::uint32_t remainder = distribution.remainder;
  std::uint32_t any = 0;
#pragma omp simd reduction(| : any)
  for (std::int64_t i = 0; i < kSuspects; ++i) {
    const std::uint32_t bit = hash_bit(static_cast<std::uint32_t>(items[i]), shift);
    any |= words[i] * num_items < remainder;
    any |= bits[bit / 32] >> bit % 32 & 1;
  }
  return any != 0;
}

}  // namespace torchrec_pt
