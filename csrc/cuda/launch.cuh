// The one way a kernel is launched, and how large its grid is.
//
// Every launch is checked and names its operation and kernel when it fails. Nothing here synchronises, allocates or changes the
// current device, so everything can be captured in a graph. Grids have as many blocks as fit on the device at once (blocks that keep
// a histogram then flush it once), fewer when there is less work.
//
// The host runtime the project uses, all of it: cudaLaunchKernel, cudaMemsetAsync, cudaGetDevice, cudaDeviceGetAttribute,
// cudaGetLastError, cudaGetErrorString.
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

// Multiprocessors of the current device, and blocks of kThreads that one of them can hold. Asked for once per device.
struct Processors {
  int count, blocks;
};
inline Processors processors_of_device(const char* op) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<uint64_t>, kDevices> cache{};  // 0: not asked yet
  int device = 0;
  check(cudaGetDevice(&device), op, "cudaGetDevice");
  const bool cached = device < kDevices;
  if (const uint64_t known = cached ? cache[device].load(std::memory_order_relaxed) : 0)
    return {static_cast<int>(known >> 32), static_cast<int>(known)};
  int count = 0, threads = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op, "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device), op, "cudaDeviceGetAttribute");
  const Processors found{count, std::max(threads / kThreads, 1)};
  // Two threads that race here store the same numbers.
  if (cached)
    cache[device].store(static_cast<uint64_t>(found.count) << 32 | static_cast<uint64_t>(found.blocks), std::memory_order_relaxed);
  return found;
}

// Blocks for `tiles` tiles, one warp each; at least 1, and at most as many as are resident at once if registers allow `per_processor`.
inline int64_t grid_for(int64_t tiles, const char* op, int per_processor = kBlocksPerProcessor) {
  const Processors processors = processors_of_device(op);
  const int64_t resident = static_cast<int64_t>(processors.count) * std::min(processors.blocks, per_processor);
  return std::clamp<int64_t>((tiles + kWarps - 1) / kWarps, 1, resident);
}

template <class... Parameters, class... Arguments>
void launch(const char* op, const char* name, void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments&&... arguments) {
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

}  // namespace bip::cuda
