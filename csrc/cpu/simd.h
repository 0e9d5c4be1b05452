// What the vectorized CPU loops share: compilation per CPU capability, and an exponential that
// the compiler can vectorize.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

// A function with this attribute is compiled for AVX-512, AVX2 and the baseline; the loader picks
// one by the CPU it finds. Loop bodies must be always_inline to be compiled with it.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__GLIBC__)
#define TORCHREC_PT_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TORCHREC_PT_CLONES
#endif

#define TORCHREC_PT_INLINE inline __attribute__((always_inline))

namespace torchrec_pt {

// exp(x) for x <= 88: x = n ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^n p(r), p of degree 6
// (the Cephes coefficients). The relative error is below 2e-7; results below 2^-126 are 0.
TORCHREC_PT_INLINE float fast_exp(float x) {
  constexpr float kSmallest = -87.33654f;   // ln 2^-126
  constexpr float kRoundBits = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x < kSmallest ? kSmallest : x;
  const float shifted = bounded * 1.44269504f + kRoundBits;
  const float n = shifted - kRoundBits;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const auto exponent = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  return x < kSmallest ? 0.f : p * std::bit_cast<float>(exponent);
}

TORCHREC_PT_INLINE double fast_exp(double x) { return std::exp(x); }

}  // namespace torchrec_pt
