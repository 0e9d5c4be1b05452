// Starting a kernel, and what a thread may ask about itself.

#pragma once

#include "simt/types.h"

namespace simt {

// Decides the order of blocks, warps and lanes of the launches that follow on any thread. At first
// it is the environment variable SIMT_SEED, or 0.
void set_seed(unsigned seed);

using Body = void (*)(const void* context);

// Runs body(context) once for each thread of the grid. `kernel` is there for its name.
// Throws std::runtime_error with one line when the kernel breaks a rule of CUDA.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
                const void* context);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t /*stream*/, Arguments... arguments) {
  const auto call = [&] { kernel(arguments...); };
  const Body body = [](const void* context) { (*static_cast<decltype(&call)>(context))(); };
  return run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &call);
}

// A thread never leaves its block and its place, hence const: the compiler may ask only once.
// They are functions of the executor, which no hook watches.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_dim();
[[gnu::const]] dim3 grid_dim();
// The block's dynamic shared memory: aligned to 16 bytes and no more, each byte 0xff at the start
// of the block, which is a NaN in every format.
[[gnu::const]] unsigned char* dynamic_shared();

[[noreturn]] void trap(Site site);

}  // namespace simt

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
