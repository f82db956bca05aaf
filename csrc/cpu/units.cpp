// Units on the CPU: the segmented sum of the upper step, their scores, and the mask of their weights.
//
// Sum: one pass over g and theta, 8 bytes per fp32 weight, item by item (unit_rule.h); an item's terms stay in the first-level cache. Score: a few
// bytes per unit. Spread: compares a mask word for every 32 units, and writes the weights of those that flipped.
// Deterministic: the order of every sum is fixed, and nothing else is added up but counts.
#include "cpu/units.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/select.h"
#include "cpu/simd.h"
#include "cpu/update.h"
#include "unit_rule.h"

namespace bip::cpu {
namespace {

constexpr int64_t kGrain = 16;  // items, or tiles of units, per piece of parallel work

struct Context {
  const Step& step;
  float scale;
  std::atomic<int64_t> nonfinite{0};
};

// Adds the terms of `count` neighbouring columns to their sums. Returns how many gradients are not finite.
template <class Kept>
BIP_HD int add_terms(const float* __restrict g, const float* __restrict theta, const Kept& kept, int count, float scale, const Hyper& hyper,
                     float* __restrict sums) {
  int nonfinite = 0;
  for (int i = 0; i < count; ++i) {
    const float gradient = g[i] * scale;
    sums[i] += term(kept(i), gradient, theta[i], hyper);
    nonfinite += !is_finite(gradient);
  }
  return nonfinite;
}

// Adds up kWidth values in pairs of neighbours.
template <int kWidth>
BIP_HD float add_in_pairs(float* x) {
  for (int half = 1; half < kWidth; half *= 2)
    for (int i = 0; i + half < kWidth; i += 2 * half) x[i] += x[i + half];
  return x[0];
}

// The sums of neighbouring units of `width` < kLanes columns each: what the full 32 partial sums would give, the missing ones being 0.
template <int kWidth>
BIP_HD void fold_units(const float* columns, int count, int width, float* sums) {
  for (int begin = 0; begin < count; begin += width) {
    float x[kWidth] = {};
    for (int i = 0; i < std::min(width, count - begin); ++i) x[i] = columns[begin + i];
    *sums++ = add_in_pairs<kWidth>(x);
  }
}

BIP_HD void fold_units(const float* columns, int count, int width, float* sums) {
  if (width == 4) return fold_units<4>(columns, count, 4, sums);
  if (width <= 1) return fold_units<1>(columns, count, width, sums);
  if (width <= 8) return fold_units<8>(columns, count, width, sums);
  fold_units<kLanes>(columns, count, width, sums);
}

// Where the terms of an item are.
struct Source {
  const Tensor& tensor;
  const Gradient& gradient;
  const Part& part;
  const Hyper hyper;
  const uint32_t* mask;  // of the units
  float scale;

  BIP_HD bool kept(int64_t unit) const { return mask[unit / kBlock] >> (unit % kBlock) & 1u; }

  // Adds the terms of columns [col, col + count) in one row, count <= kItemColumns.
  template <class Kept>
  BIP_HD int add_row(int64_t row, int64_t col, int count, const Kept& is_kept, float* sums) const {
    float buffer[kItemColumns];
    const int64_t entry = row * part.cols + col;
    const float* g = gradients_of(gradient, {&tensor, entry, count}, buffer);
    return add_terms(g, tensor.theta + entry, is_kept, count, scale, hyper, sums);
  }
};

BIP_HD int sum_narrow(const Source& source, const Item& item, float* sums) {
  float columns[kItemColumns] = {};
  uint32_t kept[kItemColumns];
  const int count = static_cast<int>(item.cols), width = static_cast<int>(source.part.block_cols);
  for (int unit = 0; unit < item.units; ++unit)
    std::fill_n(kept + unit * width, std::min(width, count - unit * width), source.kept(item.unit + unit) ? 1u : 0u);
  int nonfinite = 0;
  for (int64_t row = item.row; row < item.row + item.rows; ++row)
    nonfinite += source.add_row(row, item.col, count, [&](int i) { return kept[i] != 0; }, columns);
  fold_units(columns, count, width, sums);
  return nonfinite;
}

BIP_HD int sum_wide(const Source& source, const Item& item, float* sum) {
  float lanes[kLanes] = {};
  const bool kept = source.kept(item.unit);
  int nonfinite = 0;
  for (int64_t col = 0; col < item.cols; col += kItemColumns) {
    float columns[kItemColumns] = {};
    const int count = static_cast<int>(std::min<int64_t>(kItemColumns, item.cols - col));
    for (int64_t row = item.row; row < item.row + item.rows; ++row)
      nonfinite += source.add_row(row, item.col + col, count, [=](int) { return kept; }, columns);
    for (int i = 0; i < kItemColumns; i += kLanes)  // columns that do not exist add +0
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += columns[i + lane];
  }
  *sum = add_in_pairs<kLanes>(lanes);
  return nonfinite;
}

BIP_HD void sum_items_body(Context& context, int64_t begin, int64_t end) {
  const Step& step = context.step;
  const Part* part = std::upper_bound(step.parts, step.parts + step.num_parts, begin,
                                      [](int64_t number, const Part& other) { return number < other.first_item; }) -
                     1;
  int64_t nonfinite = 0;
  for (int64_t number = begin; number < end; ++number) {
    while (part + 1 < step.parts + step.num_parts && part[1].first_item <= number) ++part;
    const Tensor& units = step.tensors[step.unit_sets[part->set].tensor];
    const Tensor& tensor = step.tensors[part->tensor];
    const Item item(*part, number - part->first_item);
    if (item.rows == 0) continue;
    float* sums = part->sums + item.strip * units.numel + item.unit;
    const Gradient& gradient = step.gradients[part->tensor];
    if (!gradient.data) {
      std::fill_n(sums, item.units, not_a_number());
      continue;
    }
    const Source source{tensor, gradient, *part, step.hypers[tensor.hyper], units.mask, context.scale};
    nonfinite += part->block_cols < kLanes ? sum_narrow(source, item, sums) : sum_wide(source, item, sums);
  }
  if (nonfinite) context.nonfinite.fetch_add(nonfinite);
}

BIP_SIMD_VARIANTS(sum_items, (Context & context, int64_t begin, int64_t end), (context, begin, end))

uint64_t key_of(const Tensor& units, int64_t unit) { return order_key(units.scores[unit], static_cast<uint32_t>(units.index + unit)); }

// The largest key of a tile of units, without those that are needed already; 0 if there is none.
uint64_t best_key(const Tensor& units, int64_t tile) {
  uint64_t best = 0;
  for (int64_t unit = tile * kTile; unit < std::min(units.numel, (tile + 1) * kTile); ++unit)
    if (units.scores[unit] < kNeeded) best = std::max(best, key_of(units, unit));
  return best;
}

void score_tile(const Step& step, int64_t number) {
  const UnitSet& set = step.unit_sets[step.tile_tensor[number] - step.unit_sets[0].tensor];
  const Tile tile = tile_of(step, number);
  const Tensor& units = *tile.tensor;
  const Hyper& hyper = step.hypers[set.hyper];
  const bool moves_momentum = set.score_momentum && hyper.mask_momentum > 0.0f;
  std::copy_n(units.mask + tile.begin / kBlock, (tile.count + kBlock - 1) / kBlock, set.before + tile.begin / kBlock);
  for (int64_t unit = tile.begin; unit < tile.begin + tile.count; ++unit) {
    float h = 0.0f;
    for (int64_t strip = 0; strip < set.strips; ++strip) h += set.sums[strip * units.numel + unit];
    if (h == h) {
      if (moves_momentum) {
        h = hyper.mask_momentum * set.score_momentum[unit] + h;
        set.score_momentum[unit] = h;
      }
      set.scores[unit] = updated_score(set.scores[unit], h, hyper);
    }
    units.scores[unit] = set.scores[unit];
  }
  if (set.min_kept) set.best[tile.begin / kTile] = best_key(units, tile.begin / kTile);
}

// Puts the best units of a set above all others.
void lift_needed(const Step& step, const UnitSet& set) {
  const Tensor& units = step.tensors[set.tensor];
  uint64_t* const end = set.best + (units.numel + kTile - 1) / kTile;
  for (int32_t i = 0; i < set.min_kept; ++i) {
    uint64_t* const best = std::max_element(set.best, end);
    units.scores[static_cast<int64_t>(index_of_tie_key(static_cast<uint32_t>(*best))) - units.index] = kNeeded;
    *best = best_key(units, best - set.best);
  }
}

void spread_unit(const Part& part, const Tensor& tensor, int64_t unit, bool kept) {
  const Extent extent(part, unit);
  for (int64_t row = extent.row; row < extent.row + extent.rows; ++row) {
    const int64_t begin = row * part.cols + extent.col;
    for (int64_t entry = begin; entry < begin + extent.cols; ++entry) {
      tensor.mask[entry / kBlock] ^= 1u << (entry % kBlock);
      write_entry(tensor, entry, kept);
    }
  }
}

}  // namespace

int64_t sum_units(const Step& step, float scale, int threads) {
  Context context{step, scale};
  parallel_for(threads, step.num_items, kGrain, [&](int64_t begin, int64_t end) { sum_items(context, begin, end); });
  return context.nonfinite;
}

void score_units(const Step& step, int threads) {
  const int64_t first = step.unit_tile_begin;
  parallel_for(threads, step.unit_tile_end - first, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) score_tile(step, first + tile);
  });
  parallel_for(threads, step.num_unit_sets, 1, [&](int64_t begin, int64_t end) {
    for (int64_t set = begin; set < end; ++set) lift_needed(step, step.unit_sets[set]);
  });
}

// One tensor is one thread's: neighbouring units share mask words.
void spread_units(const Step& step, int threads) {
  parallel_for(threads, step.num_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = step.parts[i];
      const UnitSet& set = step.unit_sets[part.set];
      const Tensor& units = step.tensors[set.tensor];
      for (int64_t word = 0; word * kBlock < units.numel; ++word)
        for (uint32_t flips = units.mask[word] ^ set.before[word]; flips; flips &= flips - 1)
          spread_unit(part, step.tensors[part.tensor], word * kBlock + lowest_bit(flips), units.mask[word] >> lowest_bit(flips) & 1u);
    }
  });
}

}  // namespace bip::cpu
