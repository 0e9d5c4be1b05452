// Dropout whose lots are hashes of a row's bits, in one visit: no mask is held, the backward makes
// it anew. The same bits as the tensor arithmetic of torchrec_pt/ops/dropout.py.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace torchrec_pt {
namespace {

constexpr std::int64_t kWords = 64;  // hashed at a time
constexpr std::int64_t kLotsOfWord = 4;
constexpr std::int64_t kGrain = 32768;  // elements of a thread, at least

// splitmix64's finalizer (Steele, Lea, Flood 2014), as torchrec_pt/rng.py has it.
TORCHREC_PT_INLINE std::uint64_t mix(std::uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

TORCHREC_PT_CLONES void hash_words(std::uint64_t first, std::int64_t num, std::uint64_t* words) {
#pragma omp simd
  for (std::int64_t i = 0; i < num; ++i) words[i] = mix(first + static_cast<std::uint64_t>(i));
}

template <typename T>
TORCHREC_PT_INLINE void keep_loop(const T* x, const std::int16_t* lots, std::int64_t num,
                                  std::int16_t least, T scale, T* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < num; ++i) out[i] = x[i] * (lots[i] >= least ? scale : T(0));
}

TORCHREC_PT_CLONES void keep(const float* x, const std::int16_t* lots, std::int64_t num,
                             std::int16_t least, float scale, float* out) {
  keep_loop(x, lots, num, least, scale, out);
}

TORCHREC_PT_CLONES void keep(const double* x, const std::int16_t* lots, std::int64_t num,
                             std::int16_t least, double scale, double* out) {
  keep_loop(x, lots, num, least, scale, out);
}

void keep(const at::BFloat16* x, const std::int16_t* lots, std::int64_t num, std::int16_t least,
          at::BFloat16 scale, at::BFloat16* out) {
  keep_loop(x, lots, num, least, scale, out);
}

// x (T, D), D a multiple of 4; token_bits (T,) int64. An element whose 16-bit lot is below
// `threshold` becomes 0, the others are scaled by 65536 / (65536 - threshold).
at::Tensor row_dropout_cpu(const at::Tensor& x, const at::Tensor& token_bits, std::int64_t site_key,
                           std::int64_t threshold) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) % kLotsOfWord == 0,
              "row_dropout: x must be (T, D), D a multiple of 4, got ", x.sizes());
  TORCH_CHECK(token_bits.scalar_type() == at::kLong && token_bits.dim() == 1 &&
                  token_bits.size(0) == x.size(0),
              "row_dropout: token_bits must be (T,) int64, got ", token_bits.sizes(), " ",
              token_bits.scalar_type());
  TORCH_CHECK(0 <= threshold && threshold < 65536, "row_dropout: threshold must be in [0, 65536)");
  const at::Tensor source = x.contiguous(), bits = token_bits.contiguous();
  at::Tensor out = at::empty_like(source);
  const std::int64_t dim = x.size(1);
  const auto* row_bits = bits.const_data_ptr<std::int64_t>();
  const auto least = static_cast<std::int16_t>(threshold - 32768);
  const double scale = 65536.0 / static_cast<double>(65536 - threshold);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "row_dropout", [&] {
    const auto* from = source.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    const auto rounded = static_cast<scalar_t>(scale);
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, dim));
    at::parallel_for(0, x.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
      std::uint64_t words[kWords];
      for (std::int64_t row = begin; row < end; ++row) {
        const auto base =
            static_cast<std::uint64_t>(row_bits[row]) + static_cast<std::uint64_t>(site_key);
        for (std::int64_t column = 0; column < dim; column += kWords * kLotsOfWord) {
          const std::int64_t num = std::min(kWords * kLotsOfWord, dim - column);
          const std::int64_t first = column / kLotsOfWord;
          hash_words(base + static_cast<std::uint64_t>(first), num / kLotsOfWord, words);
          keep(from + row * dim + column, reinterpret_cast<const std::int16_t*>(words), num, least,
               rounded, to + row * dim + column);
        }
      }
    });
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(torchrec_pt, m) {
  m.def("row_dropout(Tensor x, Tensor token_bits, int site_key, int threshold) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchrec_pt, CPU, m) { m.impl("row_dropout", &row_dropout_cpu); }

}  // namespace
}  // namespace torchrec_pt
