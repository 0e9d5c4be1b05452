// Functions that the CPU's code and the kernels share.

#pragma once

#ifdef __CUDACC__
#define TORCHREC_PT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TORCHREC_PT_HOST_DEVICE inline __attribute__((always_inline))
#endif
