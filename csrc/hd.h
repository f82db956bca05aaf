// Marks functions that both host and device compile.
#pragma once

#if defined(__CUDACC__)
#define BIP_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define BIP_HD __forceinline
#else
#define BIP_HD inline __attribute__((always_inline))
#endif
