// What the executor costs: build and run it by hand (README.md).

#include <cstdio>
#include <ctime>
#include <vector>

#include "cases/products.cuh"

namespace {

double seconds_of(auto&& call) {
  const std::clock_t start = std::clock();  // of the process: the machine may have other work
  call();
  return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
}

__global__ void only_switch(int num_times) {
  for (int i = 0; i < num_times; ++i) __syncwarp();
}

__global__ void only_multiply(float* out, int num_times) {
  float d[4] = {};
  const std::uint32_t a[4] = {threadIdx.x, 2, 3, 4};
  for (int i = 0; i < num_times; ++i) simt::multiply_add<__nv_bfloat16>(d, a, 5, 6);
  out[threadIdx.x] = d[0];
}

template <typename T>
void bench_product(const char* name, int size) {
  std::vector<T> a(size * size, T(1.0f)), b(size * size, T(0.5f));
  std::vector<float> c(size * size);
  const unsigned tiles = size / cases::kTile;
  const double seconds = seconds_of([&] {
    simt::launch(cases::multiply<T, false>, {tiles, tiles}, 128, 4 * cases::kTileBytes<T>, nullptr,
                 a.data(), b.data(), c.data(), size, size, size);
  });
  std::printf("%s %d^3: %.1f ms, %.3f GFLOP/s\n", name, size, seconds * 1e3,
              2e-9 * size * size * size / seconds);
}

}  // namespace

int main() {
  constexpr int kTimes = 10000;
  std::vector<float> out(32);
  const double switching =
      seconds_of([&] { simt::launch(only_switch, 1, 32, 0, nullptr, kTimes); }) / kTimes;
  const double multiplying =
      seconds_of([&] { simt::launch(only_multiply, 1, 32, 0, nullptr, out.data(), kTimes); }) /
      kTimes;
  std::printf("switch: %.1f ns\nmma of a warp: %.0f ns, of these %.0f switching\n",
              switching * 1e9 / 32, multiplying * 1e9, switching * 1e9);
  for (int i = 0; i < 2; ++i) {
    for (const int size : {128, 256}) {
      bench_product<__nv_bfloat16>("bf16", size);
      bench_product<__half>("fp16", size);
      bench_product<float>("tf32", size);
    }
  }
}
