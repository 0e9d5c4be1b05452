// ldmatrix and mma.sync, with the register layouts of the PTX ISA (csrc/device/ptx.cuh).
//
// Operands travel by value: a kernel's accumulators whose address were known elsewhere would be
// watched by the hooks at every access.

#pragma once

#include <type_traits>

#include "simt/numbers.h"
#include "simt/types.h"

namespace simt {

enum class Product { kBf16, kFp16, kTf32 };

uint4 load_matrices_of_warp(const void* shared_row, bool transposed, Site site);
float4 multiply_add_of_warp(Product product, float d0, float d1, float d2, float d3,
                            std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                            std::uint32_t b0, std::uint32_t b1, Site site);

inline void load_matrices(std::uint32_t (&r)[4], const void* shared_row,
                          Site site = Site::current()) {
  const uint4 loaded = load_matrices_of_warp(shared_row, false, site);
  r[0] = loaded.x, r[1] = loaded.y, r[2] = loaded.z, r[3] = loaded.w;
}

inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* shared_row,
                                     Site site = Site::current()) {
  const uint4 loaded = load_matrices_of_warp(shared_row, true, site);
  r[0] = loaded.x, r[1] = loaded.y, r[2] = loaded.z, r[3] = loaded.w;
}

inline void multiply_add(Product product, float (&d)[4], const std::uint32_t (&a)[4],
                         std::uint32_t b0, std::uint32_t b1, Site site) {
  const float4 sum =
      multiply_add_of_warp(product, d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, site);
  d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
}

template <typename T>
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  Site site = Site::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  multiply_add(kIsHalf ? Product::kFp16 : Product::kBf16, d, a, b0, b1, site);
}

inline void multiply_add_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                              std::uint32_t b1, Site site = Site::current()) {
  multiply_add(Product::kTf32, d, a, b0, b1, site);
}

}  // namespace simt
