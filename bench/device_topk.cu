// CUB's DeviceTopK (CCCL 3.2 or later) behind a C function: a peer of the top-k benchmarks, compiled where they run (bench/cub.py).
// Writes the k largest keys, unsorted, and no mask. Not deterministic in their order.
#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_topk.cuh>

// n < 2^32: 32-bit offsets are the faster instantiation. With temp == nullptr, *temp_bytes is set to the scratch memory that is needed.
// Returns a cudaError_t.
extern "C" int bench_device_topk(void* temp, uint64_t* temp_bytes, const float* scores, float* largest, int64_t n, int64_t k,
                                 void* stream) {
  auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed, cuda::execution::output_ordering::unsorted);
  cuda::stream_ref where{static_cast<cudaStream_t>(stream)};
  auto environment = cuda::std::execution::env{where, requirements};
  size_t bytes = *temp_bytes;
  cudaError_t status =
      cub::DeviceTopK::MaxKeys(temp, bytes, scores, largest, static_cast<uint32_t>(n), static_cast<uint32_t>(k), environment);
  *temp_bytes = bytes;
  return static_cast<int>(status);
}
