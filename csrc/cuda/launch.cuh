// The one way a kernel is launched, and how large its grid is.
//
// Every launch is checked and names its operation and kernel when it fails. Nothing here synchronises, allocates or changes the
// current device, so everything can be captured in a graph. Grids have as many blocks as fit on the device at once (blocks that keep
// a histogram then flush it once), fewer when there is less than a tile for each of their warps, but a block for
// each processor while there are tiles.
//
// The host runtime the project uses, all of it: cudaLaunchKernel, cudaLaunchCooperativeKernel, cudaMemsetAsync, cudaGetDevice, cudaDeviceGetAttribute,
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

// `together`: all blocks are resident at once, so that they may wait for each other, or nothing is launched and that is an error.
template <class... Parameters, class... Arguments>
void launch_with(void (*kernel)(Parameters...), bool together, const char* op, const char* name, int64_t blocks, void* stream,
                 Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters are limited to 4 KB on older drivers");
  // Copies of the exact parameter types; cudaLaunchKernel has read them when it returns.
  auto values = std::tuple<std::remove_cv_t<std::remove_reference_t<Parameters>>...>(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
        const auto launch = [&](int64_t grid) {
          const dim3 size(static_cast<unsigned>(grid)), block(kThreads);
          return together ? cudaLaunchCooperativeKernel(kernel, size, block, pointers, 0, stream_of(stream))
                          : cudaLaunchKernel(kernel, size, block, pointers, 0, stream_of(stream));
        };
        cudaError_t error = launch(blocks);
        // A context may have fewer processors than the device says; these kernels are right on any grid.
        for (int64_t fewer = blocks / 2; error == cudaErrorCooperativeLaunchTooLarge && fewer > 0; fewer /= 2) {
          cudaGetLastError();
          error = launch(fewer);
        }
        check(error, op, name);
      },
      values);
}

struct Device {
  int processors;
  int resident;  // blocks of a kernel that are there at once: as registers and shared memory allow
};

// What the current device has for a kernel. Asked for once per kernel and device; 0 in the cache: not asked yet.
template <auto kKernel>
Device device_for(const char* op) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<uint64_t>, kDevices> cache{};
  int device = 0;
  check(cudaGetDevice(&device), op, "cudaGetDevice");
  const bool cached = device < kDevices;
  if (const uint64_t known = cached ? cache[device].load(std::memory_order_relaxed) : 0)
    return {static_cast<int>(known >> 32), static_cast<int>(known & 0xffffffffu)};
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op, "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0), op, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const Device found{processors, processors * std::max(blocks, 1)};
  // two threads that race here store the same
  if (cached)
    cache[device].store(static_cast<uint64_t>(found.processors) << 32 | static_cast<uint64_t>(found.resident), std::memory_order_relaxed);
  return found;
}

// A block for every kWarps of `tiles`, a warp for each; where that leaves processors idle a block for each of these, as far as there are tiles.
// As many as are resident at once at most, at least one.
template <auto kKernel>
int64_t blocks_for(const char* op, int64_t tiles) {
  const Device device = device_for<kKernel>(op);
  const int64_t blocks = std::max((tiles + kWarps - 1) / kWarps, std::min<int64_t>(tiles, device.processors));
  return std::clamp<int64_t>(blocks, 1, device.resident);
}

template <auto kKernel, class... Arguments>
void launch(const char* op, const char* name, int64_t tiles, void* stream, Arguments&&... arguments) {
  launch_with(kKernel, false, op, name, blocks_for<kKernel>(op, tiles), stream, std::forward<Arguments>(arguments)...);
}

// The same for a kernel with barriers over its grid.
template <auto kKernel, class... Arguments>
void launch_together(const char* op, const char* name, int64_t tiles, void* stream, Arguments&&... arguments) {
  launch_with(kKernel, true, op, name, blocks_for<kKernel>(op, tiles), stream, std::forward<Arguments>(arguments)...);
}

}  // namespace bip::cuda
