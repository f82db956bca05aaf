// What a block is: 8 warps, each with a tile of kTile consecutive entries of one tensor, each lane with four neighbours of every 128.
//
// The device subset the project uses, all of it (the host simulator in tests/sim implements this and little more):
//   __global__ __device__ __noinline__ __launch_bounds__ __grid_constant__ (behind the type), static __shared__ outside templates,
//   threadIdx.x blockIdx.x gridDim.x, __syncthreads __threadfence, __shfl_sync __shfl_up_sync __shfl_xor_sync __ballot_sync,
//   __syncwarp, __ldcg __stwb of uint4 uint2 uint32_t, __ffs __popc __clzll, atomicAdd on 32 and 64 bits, atomicXor atomicCAS on 32,
//   cooperative_groups::this_grid().sync().
// Barriers are reached by all threads of a block (or grid), collectives by all lanes of a warp: loops around them have warp- or block-uniform bounds.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "bip.h"
#include "half.h"

namespace bip::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 3;       // what __launch_bounds__ asks registers to allow: 80 each
constexpr int kBlocksPerProcessorJoint = 2;  // 128 registers: joint steps and AdamW have more arrays
constexpr int kQuad = 4;                     // entries a lane handles at once: 16 bytes of fp32
constexpr int kStride = kWarp * kQuad;       // entries a warp handles at once
constexpr int kAhead = 4;  // quads a lane loads before it uses the first, in passes that read nothing else; divides a tile
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_id() { return thread_id() % kWarp; }
__device__ __forceinline__ int warp_id() { return thread_id() / kWarp; }

// Whatever the calling thread did to memory before comes before whatever it does next, in the eyes of all blocks. A build without them is
// for tests/large/stress.py, which must find that it is wrong: BIP_FAST_MUTATION=no-fences in setup.py.
__device__ __forceinline__ void fence() {
#ifndef BIP_WITHOUT_FENCES
  __threadfence();
#endif
}

// Whole grid, of a launch whose blocks are all resident: what any block did comes before what all do next.
__device__ __forceinline__ void wait_for_all() { cooperative_groups::this_grid().sync(); }

// The contiguous share [begin, end) of `tiles` tiles that belongs to this block. Tile numbers fit an int on the device, where registers are
// scarce: 2^31 tiles are 40 TB. Entries and offsets are 64 bits.
struct Range {
  int begin, end;
};
__device__ __forceinline__ Range block_range(int64_t tiles) {
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  return {static_cast<int>(tiles * block / blocks), static_cast<int>(tiles * (block + 1) / blocks)};
}

// The register types of one 16, 8 or 4 byte access. The compiler may split the copy of a struct, but never an __ldcg or __stwb.
template <int kBytes>
struct Vector;
template <>
struct Vector<16> {
  using Type = uint4;
};
template <>
struct Vector<8> {
  using Type = uint2;
};
template <>
struct Vector<4> {
  using Type = uint32_t;
};

// Four neighbouring entries.
template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T x[kQuad];
};

// What a vector access relies on: a quad and its register type are one size, and an address that suits the one suits the other.
template <class T, class V = typename Vector<sizeof(Quad<T>)>::Type>
constexpr bool kQuadIsVector = sizeof(Quad<T>) == sizeof(V) && alignof(Quad<T>) == alignof(V) && sizeof(V) == kQuad * sizeof(T);
static_assert(kQuadIsVector<float> && kQuadIsVector<bfloat16> && kQuadIsVector<float16> && kQuadIsVector<uint8_t>);
// A tensor's first entry, its mask and its tiles begin where the quads and mask words of a warp's stride do.
static_assert(kAlign % kStride == 0 && kTile % (kAhead * kStride) == 0 && kStride % kWarp == 0 && kWarp % kQuad == 0);

template <class T>
__host__ __device__ __forceinline__ bool quad_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Quad<T>) == 0;
}

// The quad at `pointer`, of which `count` entries exist (anything outside 1..3 is 0 or 4); the rest reads as 0.
// kVector: all four exist and the pointer is aligned.
template <bool kVector, class T>
__device__ __forceinline__ Quad<T> load_quad(const T* pointer, int count) {
  if constexpr (kVector) {
    using V = typename Vector<sizeof(Quad<T>)>::Type;
    const V bits = __ldcg(reinterpret_cast<const V*>(pointer));  // bypasses the L1 cache: a step touches nothing twice
    Quad<T> quad;
    std::memcpy(&quad, &bits, sizeof quad);
    return quad;
  } else {
    Quad<T> quad{};
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (j < count) quad.x[j] = pointer[j];
    return quad;
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store_quad(T* pointer, const Quad<T>& quad, int count) {
  if constexpr (kVector) {
    using V = typename Vector<sizeof(Quad<T>)>::Type;
    V bits;
    std::memcpy(&bits, &quad, sizeof bits);
    __stwb(reinterpret_cast<V*>(pointer), bits);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (j < count) pointer[j] = quad.x[j];
  }
}

}  // namespace bip::cuda
