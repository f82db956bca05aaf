// CUDA for the host: what block.cuh and launch.cuh list, and no more, so that g++ compiles the project's .cu files as they are.
//
// A kernel launch runs to its end before cudaLaunchKernel returns. Blocks run one after the other; the threads of a block are fibres, each
// run straight to its next barrier, collective or exit. Found, and reported as the error of the launch with block, thread and source line:
//   - barriers that not all threads of the block reach, or reach at different lines; also a thread that exits before one
//   - collectives that a lane of the mask misses, reaches with another mask or at another line, or that read a lane outside the mask
//   - an index past the end of an array of known size (shared arrays), and a vector access that is not aligned to its size
//   - a barrier over the grid that a thread or a block does not reach, reaches elsewhere, or that a launch does not allow
//   - a block that goes round its barriers without end
//   - any access to unmapped memory: null, wild, or just past the end of memory from `guarded()`
//   - shared memory used before it is written: every block starts with it full of 0xA5
// With seed 0 blocks, warps and lanes run in their natural order, one block after the other. Any other seed shuffles these orders, lets
// several blocks, of at most 1024 threads in all, take turns, and lets other threads go ahead at atomics, fences and __ldcg.
//
// Limits. A race shows only if an order that some seed makes changes the result, and a spin wait on a block that is not resident hangs.
// Memory is sequentially consistent: a missing fence is not seen, but by ThreadSanitizer (.ci/sanitize), and so is a race. A wrong access to host memory is only found where a page ends: use
// `guarded()`.
// __shared__ must not be in a template. Speed says nothing about a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__ &  // written after the type: one copy of the parameter for the whole grid, as on the device
#define __shared__ static __attribute__((section("bip_shared")))

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
extern dim3 threadIdx, blockIdx, gridDim, blockDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream);

namespace sim {

enum class Collective { none, sync, ballot, shfl, shfl_up, shfl_xor };

cudaError_t run_grid(dim3 grid, dim3 block, bool together, void (*thread)(void*), void* context);
void barrier(const char* file, int line);
void grid_barrier(const char* file, int line);
uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument, const char* file, int line);
void maybe_yield();  // where another thread may go ahead
void fence();

template <class T>
T exchange(Collective kind, unsigned mask, T value, int argument, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = collective(kind, mask, bits, argument, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T, class F>
T atomic(T* address, F change) {
  maybe_yield();
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);  // for ThreadSanitizer: no race with another atomic
  __atomic_store_n(address, change(old), __ATOMIC_RELAXED);
  return old;
}

}  // namespace sim

namespace sim {

// A kernel and where its arguments are: what every thread calls.
template <class... P>
struct Call {
  void (*kernel)(P...);
  void** arguments;

  template <size_t... I>
  void run(std::index_sequence<I...>) const {
    kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
  }
  static void thread(void* self) { static_cast<const Call*>(self)->run(std::index_sequence_for<P...>()); }
};

}  // namespace sim

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  sim::Call<P...> call{kernel, arguments};
  return sim::run_grid(grid, block, false, sim::Call<P...>::thread, &call);
}
template <class... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  sim::Call<P...> call{kernel, arguments};
  return sim::run_grid(grid, block, true, sim::Call<P...>::thread, &call);
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { sim::barrier(file, line); }
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  sim::collective(sim::Collective::sync, mask, 0, 0, file, line);
}
inline void __threadfence() { sim::fence(); }

inline unsigned __ballot_sync(unsigned mask, bool vote, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return static_cast<unsigned>(sim::collective(sim::Collective::ballot, mask, vote, 0, file, line));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return sim::exchange(sim::Collective::shfl, mask, value, lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return sim::exchange(sim::Collective::shfl_up, mask, value, distance, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return sim::exchange(sim::Collective::shfl_xor, mask, value, lanes, file, line);
}

template <class T>
T __ldcg(const T* address) {
  sim::maybe_yield();
  return *address;
}
template <class T>
void __stwb(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return sim::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
inline unsigned atomicSub(unsigned* address, unsigned value) {
  return sim::atomic(address, [=](unsigned old) { return old - value; });
}
inline unsigned atomicXor(unsigned* address, unsigned value) {
  return sim::atomic(address, [=](unsigned old) { return old ^ value; });
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
  return sim::atomic(address, [=](unsigned old) { return old == expected ? value : old; });
}
