// The streaming update of one tile: the formulas of update_rule.h over blocks of 32 entries, one mask word each.
//
// Bytes per entry, fp32: lower reads g, theta, v and writes theta, v, z (24 + mask bits), with AdamW b too (32); upper reads g, theta, s and
// writes s (16 + mask bits).
// z is written only in blocks that keep something; elsewhere it is 0 and stays so.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bip.h"
#include "cpu/select.h"
#include "cpu/stream.h"
#include "half.h"
#include "update_rule.h"

namespace bip::cpu {

// The state of one tile, cut out of its Tensor.
struct Tile {
  const Tensor* tensor;
  int64_t begin;  // entry of the tensor
  int count;      // 1 .. kTile

  uint32_t word(int block) const { return tensor->mask ? tensor->mask[begin / kBlock + block] : ~0u; }
};

inline Tile tile_of(const Step& step, int64_t tile) {
  const Tensor& tensor = step.tensors[step.tile_tensor[tile]];
  const int64_t begin = (tile - tensor.first_tile) * kTile;
  return {&tensor, begin, static_cast<int>(std::min(kTile, tensor.numel - begin))};
}

BIP_HD uint64_t key_of(const Tensor& t, int64_t entry) { return order_key(t.scores[entry], static_cast<uint32_t>(index_of(t, entry))); }

template <class T>
BIP_HD void widen(const void* source, int64_t begin, int count, float* out) {
  const T* in = static_cast<const T*>(source) + begin;
  for (int i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

// Gradients as fp32: in place when they are fp32, else through a buffer that stays in the first-level cache.
BIP_HD const float* gradients_of(const Gradient& gradient, const Tile& tile, float* buffer) {
  if (gradient.dtype == DType::f32) return static_cast<const float*>(gradient.data) + tile.begin;
  if (gradient.dtype == DType::bf16) widen<bfloat16>(gradient.data, tile.begin, tile.count, buffer);
  if (gradient.dtype == DType::f16) widen<float16>(gradient.data, tile.begin, tile.count, buffer);
  return buffer;
}

template <class T>
BIP_HD void write_masked_as(const Tile& tile, int i, uint32_t word, int width) {
  T* __restrict z = static_cast<T*>(tile.tensor->param) + tile.begin + i;
  const float* __restrict theta = tile.tensor->theta + tile.begin + i;
  const int count = std::min(kBlock, tile.count - i);
  // The load does not wait for the condition: a loop with a load that may be left out does not become vector code everywhere.
  const auto masked = [&](int j) {
    const float x = theta[j];
    return word & kBit[j] ? x : 0.0f;
  };
  if (width != 0 && count == kBlock) {
    alignas(64) T values[kBlock];
    for (int j = 0; j < kBlock; ++j) from_float(masked(j), values[j]);
    stream_lines(values, z, width);
  } else if (count == kBlock) {
    for (int j = 0; j < kBlock; ++j) from_float(masked(j), z[j]);
  } else {
    for (int j = 0; j < count; ++j) from_float(masked(j), z[j]);
  }
}

// z = m*theta of the block at entry i of a tile, after theta moved. `width`: of the registers that stream; 0: ordinary stores.
BIP_HD void write_masked(const Tile& tile, int i, uint32_t word, int width) {
  if (word == 0) return;
  if (tile.tensor->dtype == DType::f32) write_masked_as<float>(tile, i, word, width);
  if (tile.tensor->dtype == DType::bf16) write_masked_as<bfloat16>(tile, i, word, width);
  if (tile.tensor->dtype == DType::f16) write_masked_as<float16>(tile, i, word, width);
}

// A dense fp32 parameter is its own theta.
BIP_HD bool has_z(const Tile& tile) { return tile.tensor->param && tile.tensor->param != tile.tensor->theta; }

// Returns the number of entries left alone because their gradient is not finite. `factors` are those of Rule::adamw; arrays that the rule
// and the phase do not have are null.
template <Rule kRule, bool kUpper, bool kScoreMomentum>
BIP_HD int update_block(int count, uint32_t word, float scale, const Hyper& hyper, const AdamwFactors& factors, const float* __restrict g,
                        float* __restrict theta, float* __restrict v, float* __restrict b, float* __restrict s, float* __restrict u) {
  int nonfinite = 0;
  for (int i = 0; i < count; ++i) {
    const float gradient = g[i] * scale;
    const bool finite = is_finite(gradient);
    const bool kept = (word & kBit[i]) != 0;
    const float old_theta = theta[i];
    if (kUpper) {
      float direction = score_gradient(kept, gradient, old_theta, hyper);
      if (kScoreMomentum) {
        direction = hyper.mask_momentum * u[i] + direction;
        u[i] = finite ? direction : u[i];
      }
      const float score = updated_score(s[i], direction, hyper);
      s[i] = finite ? score : s[i];
    }
    if constexpr (kRule == Rule::sgd) {
      float new_theta = old_theta, new_v = v[i];
      lower_update(kept, gradient, hyper, new_theta, new_v);
      theta[i] = finite ? new_theta : old_theta;
      v[i] = finite ? new_v : v[i];
    }
    if constexpr (kRule == Rule::adamw) {
      float new_theta = old_theta, new_v = v[i], new_b = b[i];
      adamw_update(kept, gradient, factors, new_theta, new_v, new_b);
      theta[i] = finite ? new_theta : old_theta;
      v[i] = finite ? new_v : v[i];
      b[i] = finite ? new_b : b[i];
    }
    if constexpr (kRule == Rule::gradient) v[i] = kept && finite ? gradient : 0.0f;
    nonfinite += !finite;
  }
  return nonfinite;
}

template <Rule kRule, bool kUpper, bool kScoreMomentum>
BIP_HD int update_entries(const Tile& tile, float scale, const Hyper& hyper, const AdamwFactors& factors, const float* g,
                          int stream_width) {
  const Tensor& t = *tile.tensor;
  float* theta = t.theta + tile.begin;
  float* v = kRule != Rule::none ? t.momentum + tile.begin : nullptr;
  float* b = kRule == Rule::adamw ? t.square + tile.begin : nullptr;
  float* s = kUpper ? t.scores + tile.begin : nullptr;
  float* u = kScoreMomentum ? t.score_momentum + tile.begin : nullptr;
  const bool writes = (kRule == Rule::sgd || kRule == Rule::adamw) && has_z(tile);
  const bool lines = writes && starts_line(static_cast<char*>(t.param) + tile.begin * (t.dtype == DType::f32 ? 4 : 2));
  const int width = lines ? stream_width : 0;
  int nonfinite = 0, i = 0;
  // Whole blocks get a constant trip count, so that they become straight vector code. z is written while theta is at hand.
  for (; i + kBlock <= tile.count; i += kBlock) {
    const uint32_t word = tile.word(i / kBlock);
    nonfinite +=
        update_block<kRule, kUpper, kScoreMomentum>(kBlock, word, scale, hyper, factors, g + i, theta + i, v + i, b + i, s + i, u + i);
    if (writes) write_masked(tile, i, word, width);
  }
  if (i < tile.count) {
    const uint32_t word = tile.word(i / kBlock);
    nonfinite += update_block<kRule, kUpper, kScoreMomentum>(tile.count - i, word, scale, hyper, factors, g + i, theta + i, v + i, b + i,
                                                             s + i, u + i);
    if (writes) write_masked(tile, i, word, 0);
  }
  return nonfinite;
}

inline bool moves_score_momentum(const Tensor& t, const Hyper& hyper) { return t.score_momentum && hyper.mask_momentum > 0.0f; }

// The scores that an upper or joint step will leave in a tile of at most one block, without leaving them there.
inline void preview_scores(const Tile& block, float scale, const Hyper& hyper, const Gradient& gradient, float* scores) {
  const Tensor& t = *block.tensor;
  std::copy(t.scores + block.begin, t.scores + block.begin + block.count, scores);
  if (!gradient.data) return;
  alignas(64) float buffer[kBlock];
  const float* g = gradients_of(gradient, block, buffer);
  float* theta = t.theta + block.begin;
  if (moves_score_momentum(t, hyper)) {
    float u[kBlock];
    std::copy(t.score_momentum + block.begin, t.score_momentum + block.begin + block.count, u);
    update_block<Rule::none, true, true>(block.count, block.word(0), scale, hyper, {}, g, theta, nullptr, nullptr, scores, u);
  } else {
    update_block<Rule::none, true, false>(block.count, block.word(0), scale, hyper, {}, g, theta, nullptr, nullptr, scores, nullptr);
  }
}

// One entry of z, where the mask flips. Units have none.
inline void write_entry(const Tensor& tensor, int64_t i, bool kept) {
  if (!tensor.param) return;
  const float value = kept ? tensor.theta[i] : 0.0f;
  if (tensor.dtype == DType::f32) static_cast<float*>(tensor.param)[i] = value;
  if (tensor.dtype == DType::bf16) from_float(value, static_cast<bfloat16*>(tensor.param)[i]);
  if (tensor.dtype == DType::f16) from_float(value, static_cast<float16*>(tensor.param)[i]);
}

// Writes the mask word and z where `flips` says, to the values of `word`.
BIP_HD void flip(const Tensor& t, int64_t first, uint32_t word, uint32_t flips) {
  t.mask[first / kBlock] = word;
  for (; flips; flips &= flips - 1) {
    const int bit = lowest_bit(flips);
    write_entry(t, first + bit, (word >> bit) & 1u);
  }
}

}  // namespace bip::cpu
