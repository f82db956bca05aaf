// The one way a kernel is launched, and how large its grid is.
//
// Every launch is checked and names its operation and kernel when it fails. Nothing here synchronises, allocates or changes the
// current device, so everything can be captured in a graph. Grids have as many blocks as fit on the device at once (blocks that keep
// a histogram then flush it once), fewer when there is less work.
//
// The host runtime the project uses, all of it: cudaLaunchKernel, cudaMemsetAsync, cudaGetDevice, cudaDeviceGetAttribute,
// cudaOccupancyMaxActiveBlocksPerMultiprocessor, cudaGetLastError, cudaGetErrorString.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "block.cuh"

namespace bip::cuda {

// The contract in bip.h does not know CUDA's types.
inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

inline void check(cudaError_t error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  const std::string message = std::string("bip::cuda::") + op + ": " + what + ": " + cudaGetErrorString(error);
  cudaGetLastError();  // a failed launch must not be reported again by the caller's next CUDA call
  throw std::runtime_error(message);
}

template <class... Parameters, class... Arguments>
void launch_with(void (*kernel)(Parameters...), const char* op, const char* name, int64_t blocks, void* stream, Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters are limited to 4 KB on older drivers");
  // Copies of the exact parameter types; cudaLaunchKernel has read them when it returns.
  auto values = std::tuple<std::remove_cv_t<std::remove_reference_t<Parameters>>...>(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
        check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), pointers, 0, stream_of(stream)), op, name);
      },
      values);
}

// Blocks of a kernel that are resident on the current device at once: as registers and shared memory allow. Asked for once per kernel and
// device; 0 in the cache: not asked yet.
template <auto kKernel>
int64_t resident_blocks(const char* op) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> cache{};
  int device = 0;
  check(cudaGetDevice(&device), op, "cudaGetDevice");
  const bool cached = device < kDevices;
  if (const int known = cached ? cache[device].load(std::memory_order_relaxed) : 0) return known;
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op, "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0), op, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int resident = processors * std::max(blocks, 1);
  if (cached) cache[device].store(resident, std::memory_order_relaxed);  // two threads that race here store the same number
  return resident;
}

// As many blocks run the kernel as are resident at once, fewer when that is more than a warp for each of `tiles`; at least one.
template <auto kKernel, class... Arguments>
void launch(const char* op, const char* name, int64_t tiles, void* stream, Arguments&&... arguments) {
  const int64_t blocks = std::clamp<int64_t>((tiles + kWarps - 1) / kWarps, 1, resident_blocks<kKernel>(op));
  launch_with(kKernel, op, name, blocks, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace bip::cuda
