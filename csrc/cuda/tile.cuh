// A tile of a step, what a warp works on, and its z.
#pragma once

#include "block.cuh"

namespace bip::cuda {

// A lane's four entries of a stride have their mask bits here in their word: tiles and strides begin with a word.
__device__ __forceinline__ unsigned bit_of_lane() { return static_cast<unsigned>(lane_id()) % 8u * kQuad; }

struct Tile {
  Tensor tensor;  // a copy: a reference would be read again for every quad, as stores to the arrays might have changed it
  int64_t first;  // of the tensor's entries
  int entries;
  int number;

  __device__ __forceinline__ Tile(const Step& step, int tile)
      : tensor(step.tensors[step.tile_tensor[tile]]), first((tile - tensor.first_tile) * kTile), number(tile) {
    const int64_t rest = tensor.numel - first;
    entries = static_cast<int>(rest < kTile ? rest : kTile);
  }
  __device__ __forceinline__ uint32_t index() const { return static_cast<uint32_t>(tensor.index + first); }
  __device__ __forceinline__ int64_t word_number(int place) const {
    return static_cast<int64_t>(static_cast<uint64_t>(first + place) / kWarp);
  }
  // The mask word of the entry at `place`; past the end 0, as the bits there are. kVector: there is no end.
  template <bool kVector>
  __device__ __forceinline__ uint32_t word(int place) const {
    if (!kVector && place >= entries) return 0u;
    return tensor.mask ? tensor.mask[word_number(place)] : ~0u;
  }
};

template <bool kVector, class T>
__device__ __forceinline__ void store_z(void* param, int64_t entry, unsigned kept, const Quad<float>& theta, int count) {
  Quad<T> z;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) from_float(kept >> j & 1u ? theta.x[j] : 0.0f, z.x[j]);
  store_quad<kVector>(static_cast<T*>(param) + entry, z, count);
}

// Writes z of the lane's quad, whose mask bits are in `word` and were in `old_word`. A 32-byte sector that neither had nor has a kept entry
// is not touched: it is 0 and stays 0.
template <bool kVector>
__device__ __forceinline__ void write_z(const Tensor& tensor, int64_t entry, uint32_t word, uint32_t old_word, const Quad<float>& theta,
                                        int count) {
  const unsigned bit = bit_of_lane(), kept = word >> bit & 0xfu;
  const uint32_t touched = word | old_word;
  if (tensor.dtype == DType::f32) {
    if (tensor.param != tensor.theta && (touched >> (bit & ~7u) & 0xffu)) store_z<kVector, float>(tensor.param, entry, kept, theta, count);
  } else if (touched >> (bit & ~15u) & 0xffffu) {
    if (tensor.dtype == DType::bf16)
      store_z<kVector, bfloat16>(tensor.param, entry, kept, theta, count);
    else
      store_z<kVector, float16>(tensor.param, entry, kept, theta, count);
  }
}

// z of one entry whose mask bit flips.
__device__ inline void flip_z(const Tensor& tensor, int64_t entry, bool kept) {
  const float value = kept ? tensor.theta[entry] : 0.0f;
  if (tensor.dtype == DType::f32)
    static_cast<float*>(tensor.param)[entry] = value;
  else if (tensor.dtype == DType::bf16)
    from_float(value, static_cast<bfloat16*>(tensor.param)[entry]);
  else
    from_float(value, static_cast<float16*>(tensor.param)[entry]);
}

}  // namespace bip::cuda
