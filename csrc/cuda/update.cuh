// One warp moves one tile of 1024 entries by the formulas of update_rule.h, four neighbouring entries per lane at a time, and judges the
// new scores while it has them.
//
//   lower  read g, theta, v, mask; write theta, v, and z where kept                    24.1 bytes per fp32 entry
//   upper  read s, theta, g, mask; write s; mask words and z where an entry flips      16.3
//   joint  both at once, all right-hand sides at the old values                        28.3 to 32.3
//   (mask momentum: read and write u, 8 more; AdamW: read and write b, 8 more; Rule::gradient: write m*g instead of theta, v and z)
//
// Gradients and parameters are fp32, bf16 or fp16: every branch on a type is the same for all lanes. Full tiles of aligned arrays move by
// 16-byte loads and stores, everything else entry by entry. What is written depends on the entry alone, so on no order.
#pragma once

#include "judge.cuh"
#include "nm.cuh"

namespace bip::cuda {

// How a tile is moved. Mask momentum and N:M have variants of their own, because most runs use neither and should not pay for them. What
// does not fit the registers is moved entry by entry: N:M with a mask momentum, and N:M in joint steps.
struct Plain {
  static constexpr bool kVector = true, kMomentum = false, kNofM = false;
};
struct NofM {
  static constexpr bool kVector = true, kMomentum = false, kNofM = true;
};
struct WithMomentum {
  static constexpr bool kVector = true, kMomentum = true, kNofM = false;
};
struct EntryByEntry {
  static constexpr bool kVector = false, kMomentum = true, kNofM = true;
};

// Quads that a lane loads before it uses the first: what the registers hold.
template <Phase kPhase, class Way>
constexpr int kUpdateAhead = kPhase == Phase::lower || !Way::kMomentum ? 2 : 1;

// Rules under which the kernels themselves move theta, and read moments for it.
template <Rule kRule>
constexpr bool kMovesTheta = kRule == Rule::sgd || kRule == Rule::adamw;

// What a multiprocessor asks of memory at once: bandwidth times latency is some 30 KB for each of an H200's, by data sheets.
template <Phase kPhase>
constexpr int kBytesInFlight = (kPhase == Phase::joint ? 4 * kBlocksPerProcessorJoint : 3 * kBlocksPerProcessor) * kThreads *
                               kUpdateAhead<kPhase, Plain> * static_cast<int>(sizeof(Quad<float>));
static_assert(kBytesInFlight<Phase::lower> >= 48 * 1024 && kBytesInFlight<Phase::upper> >= 48 * 1024 &&
              kBytesInFlight<Phase::joint> >= 48 * 1024);

// What a warp needs for one tile.
struct Job {
  Tile tile;
  const Hyper& hyper;   // read again in every turn from the L1 cache, to save registers
  float inverse_scale;  // of gradients
  const void* gradient;
  DType gradient_dtype;
  bool gradient_aligned;        // to a quad of its own
  const AdamwFactors* factors;  // in shared memory, of Rule::adamw alone
};

// What a lane counts.
struct Sums {
  uint32_t above = 0;      // keys above the window of the group that the block is at
  uint32_t nonfinite = 0;  // entries skipped
};

__device__ __forceinline__ bool moves_score_momentum(const Tensor& tensor, const Hyper& hyper) {
  return tensor.score_momentum && hyper.mask_momentum > 0.0f;
}

// s (and u) of four entries whose theta and v are still the old ones.
template <class Way>
__device__ __forceinline__ void move_scores(const Job& job, const Hyper& hyper, int64_t entry, unsigned kept, const Quad<float>& g,
                                            const Quad<float>& theta, Quad<float>& s, int exist) {
  constexpr bool kVector = Way::kVector;
  const Tensor& tensor = job.tile.tensor;
  Quad<float> h;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) h.x[j] = score_gradient(kept >> j & 1u, g.x[j], theta.x[j], hyper);
  if (Way::kMomentum && moves_score_momentum(tensor, hyper)) {
    Quad<float> u = load_quad<kVector>(tensor.score_momentum + entry, exist);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      h.x[j] = hyper.mask_momentum * u.x[j] + h.x[j];
      u.x[j] = is_finite(g.x[j]) ? h.x[j] : u.x[j];
    }
    store_quad<kVector>(tensor.score_momentum + entry, u, exist);
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) s.x[j] = is_finite(g.x[j]) ? updated_score(s.x[j], h.x[j], hyper) : s.x[j];
  store_quad<kVector>(tensor.scores + entry, s, exist);
}

// theta and its moments of four entries: v, or a and b; of Rule::gradient v alone.
template <Rule kRule, bool kVector>
__device__ __forceinline__ void move_weights(const Job& job, const Hyper& hyper, int64_t entry, unsigned kept, const Quad<float>& g,
                                             Quad<float>& theta, Quad<float>& v, Quad<float>& b, int exist) {
  const Tensor& tensor = job.tile.tensor;
  if constexpr (kRule == Rule::gradient) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) v.x[j] = (kept >> j & 1u) && is_finite(g.x[j]) ? g.x[j] : 0.0f;
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      float new_theta = theta.x[j], new_v = v.x[j];
      if constexpr (kRule == Rule::adamw) {
        float new_b = b.x[j];
        adamw_update(kept >> j & 1u, g.x[j], *job.factors, new_theta, new_v, new_b);
        b.x[j] = is_finite(g.x[j]) ? new_b : b.x[j];
      } else {
        lower_update(kept >> j & 1u, g.x[j], hyper, new_theta, new_v);
      }
      theta.x[j] = is_finite(g.x[j]) ? new_theta : theta.x[j];
      v.x[j] = is_finite(g.x[j]) ? new_v : v.x[j];
    }
    store_quad<kVector>(tensor.theta + entry, theta, exist);
    if constexpr (kRule == Rule::adamw) store_quad<kVector>(tensor.square + entry, b, exist);
  }
  store_quad<kVector>(tensor.momentum + entry, v, exist);
}

template <int kAhead_, bool kVector, class G>
__device__ __forceinline__ void load_converted(Quad<float> (&g)[kAhead_], const Job& job, int base) {
  Quad<G> raw[kAhead_];
#pragma unroll
  for (int ahead = 0; ahead < kAhead_; ++ahead) {
    const int place = base + ahead * kStride + lane_id() * kQuad;
    raw[ahead] = load_quad<kVector>(static_cast<const G*>(job.gradient) + job.tile.first + place, job.tile.entries - place);
  }
#pragma unroll
  for (int j = 0; j < kAhead_ * kQuad; ++j) g[j / kQuad].x[j % kQuad] = to_float(raw[j / kQuad].x[j % kQuad]);
}

template <int kAhead_, bool kVector>
__device__ __forceinline__ void load_gradients(Quad<float> (&g)[kAhead_], const Job& job, int base) {
  if (job.gradient_dtype == DType::f32) return load_converted<kAhead_, kVector, float>(g, job, base);
  if (job.gradient_dtype == DType::bf16) return load_converted<kAhead_, kVector, bfloat16>(g, job, base);
  return load_converted<kAhead_, kVector, float16>(g, job, base);
}

// Of a lower step.
struct Nothing {};

// One lane's quad at `place`, whole warp.
template <Phase kPhase, Rule kRule, class Way, class AnyRoom>
__device__ __forceinline__ void update_quad(const Job& job, const Hyper& hyper, AnyRoom& room, Sums& sums, int place, uint32_t old_word,
                                            Quad<float>& g, Quad<float>& theta, Quad<float>& v, Quad<float>& b, Quad<float>& s) {
  constexpr bool kVector = Way::kVector;
  const Tensor& tensor = job.tile.tensor;
  const int64_t entry = job.tile.first + place;
  const int exist = job.tile.entries - place;
  const unsigned kept = old_word >> bit_of_lane();
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    g.x[j] *= job.inverse_scale;
    if (kVector || j < exist) sums.nonfinite += !is_finite(g.x[j]);
  }
  uint32_t word = old_word;
  if constexpr (kPhase != Phase::lower) {
    if (kPhase == Phase::upper || tensor.scores) {
      move_scores<Way>(job, hyper, entry, kept, g, theta, s, exist);
      if (Way::kNofM && tensor.of != 0)
        word = tensor.row_length ? old_word : keep_quad<kVector>(job.tile, place, s, old_word);  // columns are decided afterwards
      else if (room.group.capacity != 0 && !tensor.row_length)  // else there is no window, and bits stay until the group falls back
        word = judge_quad<kVector>(room, sums.above, job.tile, place, s, old_word);
    }
  }
  if constexpr (kRule != Rule::none) move_weights<kRule, kVector>(job, hyper, entry, kept, g, theta, v, b, exist);
  if constexpr (kMovesTheta<kRule>)
    write_z<kVector>(tensor, entry, word, old_word, theta, exist);
  else if constexpr (kPhase != Phase::lower)  // theta stays, for now
    flip_quad(job.tile, place, word, old_word);
}

// All loads are issued before the first value is used; those of g come last, because their branches use them.
template <Phase kPhase, Rule kRule, class Way, class AnyRoom>
__device__ __forceinline__ void update_quads(const Job& job, AnyRoom& room, Sums& sums, int base) {
  constexpr int kAhead_ = kUpdateAhead<kPhase, Way>;
  constexpr bool kVector = Way::kVector;
  const Tensor& tensor = job.tile.tensor;
  const bool scored = kPhase == Phase::upper || (kPhase == Phase::joint && tensor.scores);
  Quad<float> theta[kAhead_], v[kAhead_], b[kAhead_], s[kAhead_], g[kAhead_];
  uint32_t words[kAhead_];
#pragma unroll
  for (int ahead = 0; ahead < kAhead_; ++ahead) {
    const int place = base + ahead * kStride + lane_id() * kQuad, exist = job.tile.entries - place;
    const int64_t entry = job.tile.first + place;
    words[ahead] = job.tile.word<kVector>(place);
    if (kPhase != Phase::lower || kRule != Rule::gradient) theta[ahead] = load_quad<kVector>(tensor.theta + entry, exist);
    if constexpr (kMovesTheta<kRule>) v[ahead] = load_quad<kVector>(tensor.momentum + entry, exist);
    if constexpr (kRule == Rule::adamw) b[ahead] = load_quad<kVector>(tensor.square + entry, exist);
    if (scored) s[ahead] = load_quad<kVector>(tensor.scores + entry, exist);
  }
  const Hyper hyper = job.hyper;
  if (kVector && job.gradient_aligned)
    load_gradients<kAhead_, true>(g, job, base);
  else  // views of a bucket or of a shard may begin anywhere
    load_gradients<kAhead_, false>(g, job, base);
#pragma unroll
  for (int ahead = 0; ahead < kAhead_; ++ahead)
    update_quad<kPhase, kRule, Way>(job, hyper, room, sums, base + ahead * kStride + lane_id() * kQuad, words[ahead], g[ahead],
                                    theta[ahead], v[ahead], b[ahead], s[ahead]);
}

// Whether all of a tile's arrays but the gradient can be moved in quads. 16-byte alignment of a parameter of a 2-byte type is more than
// needed, and what allocators give.
template <Phase kPhase, Rule kRule>
__device__ __forceinline__ bool vectorizes(const Job& job) {
  const Tensor& tensor = job.tile.tensor;
  uintptr_t bits = reinterpret_cast<uintptr_t>(tensor.theta);
  if (kPhase != Phase::upper) bits |= reinterpret_cast<uintptr_t>(tensor.momentum) | reinterpret_cast<uintptr_t>(tensor.param);
  if (kRule == Rule::adamw) bits |= reinterpret_cast<uintptr_t>(tensor.square);
  if (kPhase != Phase::lower) bits |= reinterpret_cast<uintptr_t>(tensor.scores) | reinterpret_cast<uintptr_t>(tensor.score_momentum);
  return job.tile.entries == kTile && bits % alignof(Quad<float>) == 0;
}

// Loop bounds are the warp's, because judging is done by all lanes together.
template <Phase kPhase, Rule kRule, class Way, class AnyRoom>
__device__ __forceinline__ void update_tile(const Job& job, AnyRoom& room, Sums& sums) {
#pragma unroll 1
  for (int base = 0; base < (Way::kVector ? static_cast<int>(kTile) : job.tile.entries); base += kUpdateAhead<kPhase, Way> * kStride)
    update_quads<kPhase, kRule, Way>(job, room, sums, base);
}

template <Phase kPhase, Rule kRule, class AnyRoom>
__device__ __forceinline__ void update_tile(const Job& job, AnyRoom& room, Sums& sums) {
  const bool n_of_m = kPhase != Phase::lower && job.tile.tensor.of != 0;
  const bool momentum = kPhase != Phase::lower && moves_score_momentum(job.tile.tensor, job.hyper);
  if (!vectorizes<kPhase, kRule>(job) || (n_of_m && (momentum || kPhase == Phase::joint)))
    update_tile<kPhase, kRule, EntryByEntry>(job, room, sums);
  else if (kPhase == Phase::upper && n_of_m)
    update_tile<kPhase, kRule, NofM>(job, room, sums);
  else if (momentum)
    update_tile<kPhase, kRule, WithMomentum>(job, room, sums);
  else
    update_tile<kPhase, kRule, Plain>(job, room, sums);
}

// One warp writes z of a tile: m*theta, as they are.
template <bool kVector>
__device__ void mask_tile(const Tile& tile) {
  for (int base = 0; base < tile.entries; base += kStride) {
    const int place = base + lane_id() * kQuad, exist = tile.entries - place;
    const uint32_t word = tile.word<kVector>(place);
    write_z<kVector>(tile.tensor, tile.first + place, word, word, load_quad<kVector>(tile.tensor.theta + tile.first + place, exist), exist);
  }
}

__device__ inline void mask_tile(const Tile& tile) {
  if (!tile.tensor.param) return;  // units have no z
  if (tile.entries == kTile && quad_aligned(tile.tensor.theta) && quad_aligned(static_cast<const float*>(tile.tensor.param)))
    mask_tile<true>(tile);
  else
    mask_tile<false>(tile);
}

}  // namespace bip::cuda
