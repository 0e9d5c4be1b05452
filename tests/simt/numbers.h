// The number formats of tensor cores, rounded as the device rounds.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace simt {

inline constexpr std::uint16_t kNan16 = 0x7fff;  // what the device's conversions make of any NaN

constexpr float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// To nearest, ties to even.
constexpr std::uint16_t float_to_bf16(float x) {
  if (x != x) return kNan16;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Without branches, so that loops over it become vector code.
constexpr float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t infinite = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  // Exponent and mantissa in their places; the product moves the bias from 15 to 127, and makes
  // subnormal halves normal.
  const float moved =
      std::bit_cast<float>(static_cast<std::uint32_t>(bits & 0x7fff) << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(moved) | infinite | sign);
}

// To nearest, ties to even.
constexpr std::uint16_t float_to_half(float x) {
  if (x != x) return kNan16;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  constexpr std::uint32_t kInfinite = 0x477ff000;  // 65520: half way past the largest half
  constexpr std::uint32_t kNormal = 0x38800000;    // 2^-14
  if (magnitude >= kInfinite) return sign | 0x7c00;
  if (magnitude < kNormal) {
    // A sum of 0.5 has steps of 2^-24, those of subnormal halves: the addition rounds.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(sum) - 0x3f000000);
  }
  const std::uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<std::uint16_t>((rounded - (112u << 23)) >> 13);
}

// Ties away from zero.
constexpr std::uint32_t to_tf32(float x) {
  if (x != x) return 0x7fffffff;
  return (std::bit_cast<std::uint32_t>(x) + 0x1000) & 0xffffe000;
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // a NaN stays one
}

}  // namespace simt

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  constexpr __nv_bfloat16(float x) : bits(simt::float_to_bf16(x)) {}
  constexpr operator float() const { return simt::bf16_to_float(bits); }
  std::uint16_t bits;
};

struct __half {
  __half() = default;
  constexpr __half(float x) : bits(simt::float_to_half(x)) {}
  constexpr operator float() const { return simt::half_to_float(bits); }
  std::uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __float2half(float x) { return x; }
inline float __half2float(__half x) { return x; }

namespace simt {

template <typename T>
std::uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  return T(low).bits | static_cast<std::uint32_t>(T(high).bits) << 16;
}

}  // namespace simt
