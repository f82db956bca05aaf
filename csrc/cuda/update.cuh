// One warp moves one tile of 1024 entries by the formulas of update_rule.h, four neighbouring entries per lane at a time.
//
//   lower  read g, theta, v, mask; write theta, v, and z where kept          24.1 bytes per fp32 entry
//   upper  read s, theta, g, mask; write s                                   16.1
//   joint  both at once, all right-hand sides at the old values              28.3 to 32.3
//   (mask momentum: read and write u, 8 more)
//
// Gradients and parameters are fp32, bf16 or fp16: every branch on a type is the same for all lanes. Full tiles of aligned arrays move by
// 16-byte loads and stores, everything else entry by entry. What is written depends on the entry alone, so on no order.
#pragma once

#include "select.cuh"

namespace bip::cuda {

__device__ __forceinline__ bool skipped(const Step& step) { return step.found_inf && *step.found_inf != 0.0f; }

__device__ __forceinline__ float inverse_of(const float* scale) { return scale ? 1.0f / *scale : 1.0f; }

__device__ __forceinline__ void report_nonfinite(const Step& step, unsigned nonfinite) {
  if (nonfinite) atomicAdd(reinterpret_cast<unsigned long long*>(step.num_nonfinite), static_cast<unsigned long long>(nonfinite));
}

struct Tile {
  Tensor tensor;  // a copy: stores to the arrays could change what a reference refers to, and it would be read again for every quad
  int64_t first;  // of the tensor's entries
  int entries;
  __device__ __forceinline__ Tile(const Step& step, int number)
      : tensor(step.tensors[step.tile_tensor[number]]), first((number - tensor.first_tile) * kTile) {
    const int64_t rest = tensor.numel - first;
    entries = static_cast<int>(rest < kTile ? rest : kTile);
  }
  __device__ __forceinline__ uint32_t index() const { return static_cast<uint32_t>(tensor.index + first); }
};

template <bool kVector, class T>
__device__ __forceinline__ void store_z(void* param, int64_t entry, unsigned kept, const Quad<float>& theta, int count) {
  Quad<T> z;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) from_float(kept >> j & 1u ? theta.x[j] : 0.0f, z.x[j]);
  store_quad<kVector>(static_cast<T*>(param) + entry, z, count);
}

// z of a quad whose mask bits are in `word`. A 32-byte sector without a kept entry is not touched: it is 0 and stays 0.
template <bool kVector>
__device__ __forceinline__ void write_z(const Tensor& tensor, int64_t entry, uint32_t word, const Quad<float>& theta, int count) {
  const unsigned place = static_cast<unsigned>(entry) % kWarp;
  const unsigned kept = word >> place & 0xfu;
  if (tensor.dtype == DType::f32) {
    if (tensor.param != tensor.theta && (word >> (place & ~7u) & 0xffu)) store_z<kVector, float>(tensor.param, entry, kept, theta, count);
  } else if (word >> (place & ~15u) & 0xffffu) {
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

constexpr FirstDigit kScoreDigit{0x80000000u, 19};  // of scores in [0, 1]: bin 0 starts at the key of 0, that of 1 is in bin 2032

// What a warp needs for one tile.
struct Job {
  Tile tile;
  const Hyper& hyper;   // read again for every quad, from the L1 cache: registers are scarcer
  float inverse_scale;  // of gradients
  const void* gradient;
  DType gradient_dtype;
  Histogram* histogram;  // null: the group is not counted
  unsigned nonfinite;    // entries skipped, of this lane
};

// s (and u) of four entries whose theta and v are still the old ones.
template <bool kVector>
__device__ __forceinline__ void move_scores(const Job& job, int64_t entry, unsigned kept, const Quad<float>& g, const Quad<float>& theta,
                                            Quad<float>& s, int count_) {
  const Tensor& tensor = job.tile.tensor;
  Quad<float> h;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) h.x[j] = score_gradient(kept >> j & 1u, g.x[j], theta.x[j], job.hyper);
  if (tensor.score_momentum && job.hyper.mask_momentum > 0.0f) {  // loaded this late because most runs do without, and registers are scarce
    Quad<float> u = load_quad<kVector>(tensor.score_momentum + entry, count_);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      h.x[j] = job.hyper.mask_momentum * u.x[j] + h.x[j];
      u.x[j] = is_finite(g.x[j]) ? h.x[j] : u.x[j];
    }
    store_quad<kVector>(tensor.score_momentum + entry, u, count_);
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) s.x[j] = is_finite(g.x[j]) ? updated_score(s.x[j], h.x[j], job.hyper) : s.x[j];
  store_quad<kVector>(tensor.scores + entry, s, count_);
}

// theta, v and z of four entries.
template <bool kVector>
__device__ __forceinline__ void move_weights(const Job& job, int64_t entry, uint32_t word, const Quad<float>& g, Quad<float>& theta,
                                             Quad<float>& v, int count_) {
  const Tensor& tensor = job.tile.tensor;
  const unsigned kept = word >> (entry % kWarp);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    float new_theta = theta.x[j], new_v = v.x[j];
    lower_update(kept >> j & 1u, g.x[j], job.hyper, new_theta, new_v);
    theta.x[j] = is_finite(g.x[j]) ? new_theta : theta.x[j];
    v.x[j] = is_finite(g.x[j]) ? new_v : v.x[j];
  }
  store_quad<kVector>(tensor.theta + entry, theta, count_);
  store_quad<kVector>(tensor.momentum + entry, v, count_);
  write_z<kVector>(tensor, entry, word, theta, count_);
}

template <bool kVector, class G>
__device__ __forceinline__ Quad<float> load_converted(const void* data, int64_t entry, int count_) {
  const Quad<G> raw = load_quad<kVector>(static_cast<const G*>(data) + entry, count_);
  Quad<float> quad;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) quad.x[j] = to_float(raw.x[j]);
  return quad;
}

template <bool kVector>
__device__ __forceinline__ Quad<float> load_gradient(const Job& job, int64_t entry, int count_) {
  if (job.gradient_dtype == DType::f32) return load_converted<kVector, float>(job.gradient, entry, count_);
  if (job.gradient_dtype == DType::bf16) return load_converted<kVector, bfloat16>(job.gradient, entry, count_);
  return load_converted<kVector, float16>(job.gradient, entry, count_);
}

// One lane, four entries. All loads are issued before the first value is used; that of g comes last, because its branches use it.
template <Phase kPhase, bool kVector>
__device__ __forceinline__ void update_quad(Job& job, int place, int count_) {
  const Tensor& tensor = job.tile.tensor;
  const int64_t entry = job.tile.first + place;
  const bool scored = kPhase == Phase::upper || (kPhase == Phase::joint && tensor.group >= 0);
  const uint32_t word = tensor.mask ? tensor.mask[entry / kWarp] : ~0u;
  Quad<float> theta = load_quad<kVector>(tensor.theta + entry, count_), v, s;
  if constexpr (kPhase != Phase::upper) v = load_quad<kVector>(tensor.momentum + entry, count_);
  if (scored) s = load_quad<kVector>(tensor.scores + entry, count_);
  Quad<float> g = load_gradient<kVector>(job, entry, count_);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    g.x[j] *= job.inverse_scale;
    if (kVector || j < count_) job.nonfinite += !is_finite(g.x[j]);
  }
  if (scored) move_scores<kVector>(job, entry, word >> (entry % kWarp), g, theta, s, count_);
  if constexpr (kPhase != Phase::upper) move_weights<kVector>(job, entry, word, g, theta, v, count_);
  if constexpr (kPhase != Phase::lower) {
    if (!scored || !job.histogram) return;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const uint32_t key = score_key(s.x[j]);
      if (kVector || j < count_) count(*job.histogram, first_bin(kScoreDigit, key), key);
    }
  }
}

// Whether all of a tile's arrays can be moved in quads. 16-byte alignment for 2-byte types is more than needed, and what allocators give.
template <Phase kPhase>
__device__ __forceinline__ bool vectorizes(const Job& job) {
  const Tensor& tensor = job.tile.tensor;
  uintptr_t bits = reinterpret_cast<uintptr_t>(job.gradient) | reinterpret_cast<uintptr_t>(tensor.theta);
  if (kPhase != Phase::upper) bits |= reinterpret_cast<uintptr_t>(tensor.momentum) | reinterpret_cast<uintptr_t>(tensor.param);
  if (kPhase != Phase::lower) bits |= reinterpret_cast<uintptr_t>(tensor.scores) | reinterpret_cast<uintptr_t>(tensor.score_momentum);
  return job.tile.entries == kTile && bits % alignof(Quad<float>) == 0;
}

template <Phase kPhase>
__device__ __forceinline__ void move_tile(Job& job) {
  const int lane = lane_id() * kQuad;
  if (vectorizes<kPhase>(job)) {
#pragma unroll 1
    for (int place = lane; place < kTile; place += kStride) update_quad<kPhase, true>(job, place, kQuad);
  } else {
#pragma unroll 1
    for (int place = lane; place < job.tile.entries; place += kStride) update_quad<kPhase, false>(job, place, job.tile.entries - place);
  }
}

// A tile without a gradient: nothing moves, but its scores take part in the selection.
__device__ inline void count_tile(const Job& job) {
  if (!job.histogram) return;
  for (int place = lane_id(); place < job.tile.entries; place += kWarp) {
    const uint32_t key = score_key(job.tile.tensor.scores[job.tile.first + place]);
    count(*job.histogram, first_bin(kScoreDigit, key), key);
  }
}

}  // namespace bip::cuda
