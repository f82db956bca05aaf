// Units on a CUDA device: the segmented sum of the upper step, their scores, and the mask of their weights.
//
//   sums    one warp per item (unit_rule.h): reads g and theta once, 8 bytes per fp32 weight; neighbouring lanes read neighbouring columns
//   scores  one warp per tile of 1024 units: s (and u) of each, and the score that the selection sees; the warp that completes a set lifts
//           the units that its layer must keep above all others
//   spread  one warp per mask word of 32 units: the weights of those that flipped in the selection get their mask bit and z
//
// The order of every sum is fixed (unit_rule.h); all else are integers, and choices by unique keys.
#pragma once

#include "unit_rule.h"
#include "update.cuh"
#include "workspace.cuh"

namespace bip::cuda {

// The gradient of a tensor, whose pointer came by value or through the workspace.
__device__ __forceinline__ Gradient gradient_of(const Args& args, const GradientTable& table, int tensor) {
  if (tensor < kInlineGradients) return {table.data[tensor], static_cast<DType>(table.dtype[tensor]), 0};
  return args.workspace.gradients[tensor - kInlineGradients];
}

__device__ __forceinline__ float add_lanes(float x) {
#pragma unroll
  for (int half = 1; half < kWarp; half *= 2) x += __shfl_xor_sync(kAllLanes, x, half);  // of two equal sums, whichever way round
  return x;
}

__device__ __forceinline__ bool mask_bit(const uint32_t* mask, int64_t i) { return mask[i / kWarp] >> (i % kWarp) & 1u; }

constexpr int kTermsAhead = 12;  // pairs of loads in flight in every lane: 48 KB on a multiprocessor. Not tuned on a GPU yet.
static_assert(kTermsAhead * 2 * static_cast<int>(sizeof(float)) * kThreads * kBlocksPerProcessorJoint >= 48 * 1024);

// What a warp needs to know of an item's terms.
template <class G>
struct Terms {
  const G* gradient;
  const float* theta;
  Hyper hyper;  // a copy: a reference would be read again for every term
  float inverse_scale;
  int64_t cols;

  // The sum of `count` terms, `stride` entries apart. All loads are issued before the first value is used, because nothing else hides their
  // latency. Past the end the last entry is read again and left out: a branch there would hold the loads back.
  __device__ __forceinline__ float sum_of(int64_t first, int64_t stride, int64_t count, bool kept, uint32_t& nonfinite) const {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i += kTermsAhead) {
      float g[kTermsAhead], x[kTermsAhead];
#pragma unroll
      for (int j = 0; j < kTermsAhead; ++j) {
        const int64_t entry = first + (i + j < count ? i + j : count - 1) * stride;
        g[j] = to_float(gradient[entry]);
        x[j] = theta[entry];
      }
#pragma unroll
      for (int j = 0; j < kTermsAhead; ++j) {
        const bool exists = i + j < count;
        g[j] *= inverse_scale;
        const float more = sum + term(kept, g[j], x[j], hyper);
        sum = exists ? more : sum;
        nonfinite += exists && !is_finite(g[j]);
      }
    }
    return sum;
  }

  // Of one column of an item, rows in order.
  __device__ __forceinline__ float sum_of_column(const Item& item, int64_t col, bool kept, uint32_t& nonfinite) const {
    return sum_of(item.row * cols + col, cols, item.rows, kept, nonfinite);
  }
};

// Units of 32 columns or more: a lane has every 32nd.
template <class G>
__device__ __forceinline__ void sum_wide(const Terms<G>& terms, const Item& item, int64_t width, const uint32_t* mask, float* sums,
                                         uint32_t& nonfinite) {
  for (int unit = 0; unit < item.units; ++unit) {
    const bool kept = mask_bit(mask, item.unit + unit);
    const int64_t begin = item.col + unit * width + lane_id(), end = item.col + smaller((unit + 1) * width, item.cols);
    float lane_sum = 0.0f;
    if (item.rows == 1) {  // a filter: every column is one term
      if (begin < end) lane_sum = terms.sum_of(item.row * terms.cols + begin, kWarp, ceil_div(end - begin, kWarp), kept, nonfinite);
    } else {
      for (int64_t col = begin; col < end; col += kWarp) lane_sum += terms.sum_of_column(item, col, kept, nonfinite);
    }
    const float sum = add_lanes(lane_sum);
    if (lane_id() == 0) sums[item.unit + unit] = sum;
  }
}

// Several narrow units: the sums of their columns go through `columns` in shared memory, then a lane has a unit.
template <class G>
__device__ __forceinline__ void sum_narrow(const Terms<G>& terms, const Item& item, int width, const uint32_t* mask, float* columns,
                                           float* sums, uint32_t& nonfinite) {
  for (int i = lane_id(); i < item.cols; i += kWarp) {
    columns[i] = terms.sum_of_column(item, item.col + i, mask_bit(mask, item.unit + i / width), nonfinite);
  }
  __syncwarp();
  for (int unit = lane_id(); unit < item.units; unit += kWarp) {
    float* x = columns + unit * width;
    const int rest = static_cast<int>(item.cols) - unit * width, count = rest < width ? rest : width;
    for (int half = 1; half < count; half *= 2)
      for (int i = 0; i + half < count; i += 2 * half) x[i] += x[i + half];  // what does not exist would add +0
    sums[item.unit + unit] = x[0];
  }
  __syncwarp();
}

template <class G>
__device__ __forceinline__ void sum_item(const Step& step, const Part& part, const Item& item, const void* gradient, float inverse_scale,
                                         float* columns, uint32_t& nonfinite) {
  const Tensor& units = step.tensors[step.unit_sets[part.set].tensor];
  const Tensor& tensor = step.tensors[part.tensor];
  const Terms<G> terms{static_cast<const G*>(gradient), tensor.theta, step.hypers[tensor.hyper], inverse_scale, part.cols};
  float* sums = part.sums + item.strip * units.numel;
  if (part.block_cols < kLanes)
    sum_narrow(terms, item, static_cast<int>(part.block_cols), units.mask, columns, sums, nonfinite);
  else
    sum_wide(terms, item, part.block_cols, units.mask, sums, nonfinite);
}

// The last part whose items begin at or before `number`.
__device__ __forceinline__ const Part& part_of(const Step& step, int64_t number) {
  int64_t low = 0, high = step.num_parts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (step.parts[middle].first_item <= number)
      low = middle;
    else
      high = middle;
  }
  return step.parts[low];
}

// Neighbours are of different blocks, so that few of them are spread over all processors.
__device__ __forceinline__ int global_warp() { return warp_id() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int num_warps() { return static_cast<int>(gridDim.x) * kWarps; }

// Items are dealt out one by one: neighbours are of one tensor and so of one size. Returns how many gradients of a lane are not finite.
__device__ inline uint32_t sum_items(const Args& args, const GradientTable& table, float inverse_scale, float* columns) {
  const Step& step = args.step;
  uint32_t nonfinite = 0;
  for (int64_t number = global_warp(); number < step.num_items; number += num_warps()) {
    const Part& part = part_of(step, number);
    const uint32_t before = nonfinite;
    const Item item(part, number - part.first_item);
    if (item.rows == 0) continue;
    const Gradient gradient = gradient_of(args, table, part.tensor);
    if (!gradient.data) {
      float* sums = part.sums + item.strip * step.tensors[step.unit_sets[part.set].tensor].numel;
      for (int unit = lane_id(); unit < item.units; unit += kWarp) sums[item.unit + unit] = not_a_number();
    } else if (gradient.dtype == DType::f32) {
      sum_item<float>(step, part, item, gradient.data, inverse_scale, columns, nonfinite);
    } else if (gradient.dtype == DType::bf16) {
      sum_item<bfloat16>(step, part, item, gradient.data, inverse_scale, columns, nonfinite);
    } else {
      sum_item<float16>(step, part, item, gradient.data, inverse_scale, columns, nonfinite);
    }
    if (step.tensors[part.tensor].elsewhere) nonfinite = before;
  }
  return nonfinite;
}

__device__ __forceinline__ uint64_t max_of_warp(uint64_t x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(x), lanes);
    x = other > x ? other : x;
  }
  return x;
}

// Key of a unit; 0 when it is above all others already, or has no score (NaN).
__device__ __forceinline__ uint64_t key_of(const Tensor& units, int64_t unit, float score) {
  return score < kNeeded ? full_key(score_key(score), static_cast<uint32_t>(index_of(units, unit))) : 0;
}

// Scores of one tile of units, by one warp. Returns the largest key.
__device__ __forceinline__ uint64_t score_tile(const Step& step, const UnitSet& set, const Tile& tile) {
  const Tensor& units = tile.tensor;
  const Hyper hyper = step.hypers[set.hyper];
  const bool moves_momentum = set.score_momentum && hyper.mask_momentum > 0.0f;
  uint64_t best = 0;
  for (int place = lane_id(); place < tile.entries; place += kWarp) {
    const int64_t unit = tile.first + place;
    if (lane_id() == 0) set.before[unit / kWarp] = units.mask[unit / kWarp];
    float h = 0.0f, s = set.scores[unit];
#pragma unroll 4
    for (int64_t strip = 0; strip < set.strips; ++strip) h += set.sums[strip * units.numel + unit];
    if (h == h) {
      if (moves_momentum) {
        h = hyper.mask_momentum * set.score_momentum[unit] + h;
        set.score_momentum[unit] = h;
      }
      s = updated_score(s, h, hyper);
      set.scores[unit] = s;
    }
    units.scores[unit] = s;
    const uint64_t key = key_of(units, unit, s);
    best = key > best ? key : best;
  }
  return max_of_warp(best);
}

// One warp lifts the best units of a set above all others: it takes the best of the tiles' best, replaces it by that tile's next, and so
// on.
__device__ inline void lift_needed(const UnitSet& set, const Tensor& units) {
  const int64_t tiles = ceil_div(units.numel, kTile);
  for (int32_t i = 0; i < set.min_kept; ++i) {
    uint64_t best = 0;
    for (int64_t tile = lane_id(); tile < tiles; tile += kWarp) best = set.best[tile] > best ? set.best[tile] : best;
    best = max_of_warp(best);
    if (best == 0) return;  // no unit is left
    const int64_t unit = static_cast<int64_t>(index_of_tie_key(static_cast<uint32_t>(best))) - units.index, tile = unit / kTile;
    if (lane_id() == 0) units.scores[unit] = kNeeded;
    __syncwarp();
    uint64_t next = 0;
    for (int64_t other = tile * kTile + lane_id(); other < smaller(units.numel, (tile + 1) * kTile); other += kWarp) {
      const uint64_t key = key_of(units, other, units.scores[other]);
      next = key > next ? key : next;
    }
    next = max_of_warp(next);
    if (lane_id() == 0) set.best[tile] = next;
    __syncwarp();
  }
}

// One warp per tile of units. `lift`: else the ranks lift units together, later. Interleaving: a warp's scores and best keys come before its
// own add to `seen` (warp barrier, fence, add). In the warp whose add completes the set, lane 0 reads from all of these adds. Its fence orders
// what they published before what lane 0 does next, and the warp barrier after that before what the other lanes read. A shuffle alone orders no
// memory.
// tests/kernels/test_memory_model.py reads the statements from the first warp barrier on, one a line.
__device__ inline void score_units(const Step& step, bool lift) {
  for (int64_t number = step.unit_tile_begin + global_warp(); number < step.unit_tile_end; number += num_warps()) {
    const Tile tile(step, static_cast<int>(number));
    const UnitSet& set = step.unit_sets[step.tile_tensor[number] - step.unit_sets[0].tensor];
    const uint64_t best = score_tile(step, set, tile);
    if (set.min_kept == 0) continue;
    if (!lift) {
      if (lane_id() == 0) set.best[tile.first / kTile] = best;
      continue;
    }
    __syncwarp();
    uint32_t before = 0;
    if (lane_id() == 0) {
      set.best[tile.first / kTile] = best;
      fence();
      before = atomicAdd(set.seen, 1u);
      fence();
    }
    before = __shfl_sync(kAllLanes, before, 0);
    __syncwarp();
    if (before + 1 != ceil_div(tile.tensor.numel, kTile)) continue;
    if (lane_id() == 0) *set.seen = 0;  // no other warp follows
    lift_needed(set, tile.tensor);
  }
}

// One warp flips all weights of one unit.
__device__ inline void spread_unit(const Part& part, const Tensor& tensor, int64_t unit, bool kept) {
  const Extent extent(part, unit);
  const int64_t weights = extent.rows * extent.cols;
  for (int64_t i = lane_id(); i < weights; i += kWarp) {
    const int64_t entry = (extent.row + i / extent.cols) * part.cols + extent.col + i % extent.cols;
    atomicXor(&tensor.mask[entry / kWarp], 1u << (entry % kWarp));  // other units have bits in the word
    flip_z(tensor, entry, kept);
  }
}

// One warp per mask word of units.
__device__ inline void spread_units(const Step& step) {
  constexpr int64_t kWords = kTile / kWarp;
  const int64_t end = step.unit_tile_end * kWords;
  for (int64_t number = step.unit_tile_begin * kWords + global_warp(); number < end; number += num_warps()) {
    const int row = step.tile_tensor[number / kWords];
    const UnitSet& set = step.unit_sets[row - step.unit_sets[0].tensor];
    const Tensor& units = step.tensors[row];
    const int64_t word = number - units.first_tile * kWords;
    if (word * kWarp >= units.numel) continue;
    const uint32_t mask = units.mask[word];
    for (uint32_t flips = mask ^ set.before[word]; flips; flips &= flips - 1) {
      const int bit = __ffs(static_cast<int>(flips)) - 1;
      for (int part = set.part_begin; part < set.part_end; ++part)
        spread_unit(step.parts[part], step.tensors[step.parts[part].tensor], word * kWarp + bit, mask >> bit & 1u);
    }
  }
}

}  // namespace bip::cuda
