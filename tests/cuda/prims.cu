// prims FILE: runs the primitives of the kernels on fixed inputs, and writes inputs and results to
// FILE, one line each: a name and words of 32 bits in hexadecimal. nvcc compiles it for the device,
// g++ for the executor of tests/simt; test_prims.py compares the two.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "device/ptx.cuh"

namespace {

using namespace torchrec_pt::device;
using Word = std::uint32_t;
using Words = std::vector<Word>;

constexpr int kLanes = 32;

// --- kernels ------------------------------------------------------------------------------------

__device__ Word to_word(__nv_bfloat16 x) { return *reinterpret_cast<const std::uint16_t*>(&x); }
__device__ Word to_word(__half x) { return *reinterpret_cast<const std::uint16_t*>(&x); }

constexpr int kNumConversions = 10;
constexpr const char* kConversions[kNumConversions] = {
    "to_tf32", "pack_bf16", "pack_fp16", "to_bf16", "to_fp16",
    "exp2",    "log2",      "maximum",   "fma",     "quotient"};

__global__ void convert(const float* in, int num, Word* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= num) return;
  const float x = in[i], next = in[(i + 1) % num], third = in[(i + 7) % num];
  const float sum = fmaf(x, next, third);
  const Word results[kNumConversions] = {
      to_tf32(x),
      pack<__nv_bfloat16>(x, next),
      pack<__half>(x, next),
      to_word(__float2bfloat16_rn(x)),
      to_word(__float2half_rn(x)),
      __float_as_uint(exp2_approx(x)),
      __float_as_uint(log2f(x)),
      __float_as_uint(fmaxf(sum, x + third)),
      __float_as_uint(sum),
      __float_as_uint(x / next),
  };
  for (int k = 0; k < kNumConversions; ++k) out[k * num + i] = results[k];
}

__global__ void exchange(const float* in, Word* out) {
  const int lane = threadIdx.x;
  for (int k = 0; k < 5; ++k) {
    out[k * kLanes + lane] = __float_as_uint(__shfl_xor_sync(0xffffffff, in[lane], 1 << k));
  }
}

constexpr Word kUntouched = 0xa5a5a5a5;

// Thread v copies v bytes of kBytes, to 16 bytes of its own.
template <int kBytes>
__global__ void copy(const Word* in, Word* out) {
  auto* own = reinterpret_cast<Word*>(dynamic_shared()) + 4 * threadIdx.x;
  for (int i = 0; i < 4; ++i) own[i] = kUntouched;
  __syncthreads();
  copy_async<kBytes>(own, in + 4 * threadIdx.x, threadIdx.x);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = own[i];
}

// 32 rows of 8 values, 32 bytes apart.
__global__ void load(const Word* in, Word* out) {
  const int lane = threadIdx.x;
  auto* own = reinterpret_cast<Word*>(dynamic_shared()) + 8 * lane;
  for (int i = 0; i < 4; ++i) own[i] = in[4 * lane + i];
  __syncwarp();
  Word plain[4], transposed[4];
  load_matrices(plain, own);
  load_matrices_transposed(transposed, own);
  for (int i = 0; i < 4; ++i) {
    out[i * kLanes + lane] = plain[i];
    out[(4 + i) * kLanes + lane] = transposed[i];
  }
}

template <typename T>
constexpr int kPerRegister = sizeof(T) == 2 ? 2 : 1;

// Of each lane four registers of A and two of B, as floats that the format holds, and four of D.
template <typename T>
__global__ void multiply(const float* a, const float* b, const float* d, Word* out) {
  const int lane = threadIdx.x;
  const auto operand = [](const float* from) {
    if constexpr (sizeof(T) == 2) {
      return pack<T>(from[0], from[1]);
    } else {
      return to_tf32(from[0]);
    }
  };
  Word registers[6];
  for (int i = 0; i < 4; ++i) registers[i] = operand(a + (4 * lane + i) * kPerRegister<T>);
  for (int i = 0; i < 2; ++i) registers[4 + i] = operand(b + (2 * lane + i) * kPerRegister<T>);
  const Word left[4] = {registers[0], registers[1], registers[2], registers[3]};
  float sums[4] = {d[4 * lane], d[4 * lane + 1], d[4 * lane + 2], d[4 * lane + 3]};
  if constexpr (sizeof(T) == 2) {
    multiply_add<T>(sums, left, registers[4], registers[5]);
  } else {
    multiply_add_tf32(sums, left, registers[4], registers[5]);
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = __float_as_uint(sums[i]);
}

// --- memory that both sides see -----------------------------------------------------------------

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "prims: %s\n", what);
  std::exit(1);
}

template <typename T>
class Shared {
 public:
  explicit Shared(const std::vector<T>& values) : size_(values.size()) {
#ifdef __CUDACC__
    require(cudaMallocManaged(&data_, size_ * sizeof(T)) == cudaSuccess, "no memory");
#else
    data_ = new T[size_];
#endif
    std::memcpy(data_, values.data(), size_ * sizeof(T));
  }
  ~Shared() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    delete[] data_;
#endif
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  T* data() const { return data_; }
  std::vector<T> values() const { return {data_, data_ + size_}; }

 private:
  std::size_t size_;
  T* data_;
};

// The `num` words that the kernel, given inputs and a place for results, leaves there.
template <typename Kernel, typename... Inputs>
Words run(Kernel kernel, int num_threads, int num, const Inputs&... inputs) {
  const Shared<Word> out(Words(num, kUntouched));
  const auto error =
      launch(kernel, dim3((num_threads + 127) / 128), dim3(num_threads < 128 ? num_threads : 128),
             1024, nullptr, inputs..., out.data());
  require(error == cudaSuccess, cudaGetErrorString(error));
#ifdef __CUDACC__
  const auto later = cudaDeviceSynchronize();
  require(later == cudaSuccess, cudaGetErrorString(later));
#endif
  return out.values();
}

// --- inputs -------------------------------------------------------------------------------------

class Random {
 public:
  Word next() { return state_ = state_ * 1664525 + 1013904223; }
  // A multiple of 1/4 in -2..2: sums of products of such are exact.
  float coarse() { return static_cast<float>(next() >> 28) / 4 - 2; }
  float fine() { return static_cast<float>(next() >> 8) * 0x1p-22f - 2; }

 private:
  Word state_ = 1;
};

float to_float(Word bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

Words to_words(const std::vector<float>& values) {
  Words words(values.size());
  if (!values.empty()) std::memcpy(words.data(), values.data(), values.size() * sizeof(Word));
  return words;
}

// Every exponent with mantissas at and beside the ties of each format, and others at random.
std::vector<float> floats_to_convert() {
  std::vector<float> values;
  for (Word exponent = 0; exponent < 256; ++exponent) {
    for (const Word mantissa : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x3000u, 0x7fffu, 0x8000u,
                                0x8001u, 0x18000u, 0x400000u, 0x7fefffu, 0x7ff000u, 0x7fffffu}) {
      values.push_back(to_float(exponent << 23 | mantissa));
      values.push_back(to_float(1u << 31 | exponent << 23 | mantissa));
    }
  }
  Random random;
  for (int i = 0; i < 4096; ++i) values.push_back(to_float(random.next() ^ random.next() >> 16));
  for (int i = 0; i < 4096; ++i) values.push_back(random.fine() * 80);  // where exp2 is finite
  return values;
}

// --- the output ---------------------------------------------------------------------------------

std::FILE* file;

void write(const char* name, const char* suffix, const Word* words, std::size_t num) {
  std::fprintf(file, "%s%s", name, suffix);
  for (std::size_t i = 0; i < num; ++i) std::fprintf(file, " %08x", words[i]);
  std::fprintf(file, "\n");
}

void write(const char* name, const Words& words) { write(name, "", words.data(), words.size()); }

void write_conversions() {
  const std::vector<float> values = floats_to_convert();
  const int num = static_cast<int>(values.size());
  write("convert_in", to_words(values));
  const Shared<float> in(values);
  const Words out = run(convert, num, num * kNumConversions, in.data(), num);
  for (int k = 0; k < kNumConversions; ++k) write(kConversions[k], "", &out[k * num], num);
}

template <int kBytes>
void write_copies(const char* name, const Shared<Word>& in) {
  write(name, run(copy<kBytes>, kBytes + 1, 4 * (kBytes + 1), in.data()));
}

template <typename T>
void write_products(const char* name, const char* suffix, const std::vector<float>& a,
                    const std::vector<float>& b, const std::vector<float>& d) {
  const auto write_part = [&](const char* part, const Words& words) {
    std::fprintf(file, "%s_%s", name, part);
    write("", suffix, words.data(), words.size());
  };
  write_part("a", to_words(a));
  write_part("b", to_words(b));
  write_part("d", to_words(d));
  const Shared<float> left(a), right(b), sums(d);
  write_part("out", run(multiply<T>, kLanes, 4 * kLanes, left.data(), right.data(), sums.data()));
}

// `largest` and `subnormal` are of the format.
template <typename T>
void write_products(const char* name, float largest, float subnormal) {
  constexpr int kNumA = 4 * kLanes * kPerRegister<T>, kNumB = kNumA / 2;
  std::vector<float> a(kNumA), b(kNumB), d(4 * kLanes);
  Random random;
  for (auto* values : {&a, &b, &d}) {
    for (float& value : *values) value = random.coarse();
  }
  write_products<T>(name, "_exact", a, b, d);
  for (auto* values : {&a, &b, &d}) {
    for (float& value : *values) value = random.fine();
  }
  write_products<T>(name, "_rounded", a, b, d);
  // One odd value in some rows of A, of which B multiplies each by 1, 0 and -1.
  const float odd[] = {INFINITY, -INFINITY, NAN, largest, subnormal};
  for (int i = 0; i < kNumA; ++i) {
    const int lane = i / (4 * kPerRegister<T>);
    a[i] = i % (4 * kPerRegister<T>) == 0 && lane % 4 == 0 && lane < 20 ? odd[lane / 4] : 1;
  }
  for (int i = 0; i < kNumB; ++i) {
    const int column = i / (2 * kPerRegister<T>) / 4;
    b[i] = static_cast<float>(column % 3) - 1;
  }
  std::fill(d.begin(), d.end(), 0.0f);
  write_products<T>(name, "_odd", a, b, d);
}

void write_all() {
  write_conversions();
  Random random;
  std::vector<float> lanes(kLanes);
  for (float& value : lanes) value = random.fine();
  lanes[5] = NAN;
  write("exchange_in", to_words(lanes));
  write("exchange", run(exchange, kLanes, 5 * kLanes, Shared<float>(lanes).data()));
  Words words(4 * kLanes);
  for (Word& word : words) word = random.next();
  write("words_in", words);
  const Shared<Word> in(words);
  write_copies<4>("copy_4", in);
  write_copies<8>("copy_8", in);
  write_copies<16>("copy_16", in);
  write("load", run(load, kLanes, 8 * kLanes, in.data()));
  write_products<__nv_bfloat16>("bf16", 0x1.fep127f, 0x1p-130f);
  write_products<__half>("fp16", 65504.0f, 0x1p-20f);
  write_products<float>("tf32", 0x1.ffcp127f, 0x1p-130f);
}

}  // namespace

int main(int num_arguments, char** arguments) {
  require(num_arguments == 2, "give the file to write");
  file = std::fopen(arguments[1], "w");
  require(file != nullptr, "the file cannot be written");
  write_all();
  require(std::fclose(file) == 0, "the file cannot be written");
}
