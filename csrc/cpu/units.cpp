// Units on the CPU: the segmented sum of the upper step, their scores, and the mask of their weights.
//
// Sum: one pass over g and theta, 8 bytes per fp32 weight, item by item (unit_rule.h); an item's terms stay in the first-level cache.
// Score: a few bytes per unit. Spread: compares a mask word for every 32 units, and writes the weights of those that flipped.
// Deterministic: the order of every floating-point sum is fixed; all other sums are counts.
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

// Adds the terms of `count` neighbouring columns to their sums, or to 0 if these are `kNew`. Returns how many gradients are not finite.
template <bool kNew, class Kept>
BIP_HD int add_terms(const float* __restrict g, const float* __restrict theta, const Kept& kept, int count, float scale, const Hyper& hyper,
                     float* __restrict sums) {
  int nonfinite = 0;
  for (int i = 0; i < count; ++i) {
    const float gradient = g[i] * scale;
    sums[i] = (kNew ? 0.0f : sums[i]) + term(kept(i), gradient, theta[i], hyper);
    nonfinite += !is_finite(gradient);
  }
  return nonfinite;
}

// Adds neighbours, which leaves half as many values. Not in place, because compilers do not vectorise that.
BIP_HD void add_neighbours(const float* __restrict x, int pairs, float* __restrict sums) {
  for (int i = 0; i < pairs; ++i) sums[i] = x[2 * i] + x[2 * i + 1];
}

BIP_HD float add_in_pairs(const float* x) {
  float y[kLanes / 2], z[kLanes / 4];
  add_neighbours(x, kLanes / 2, y);
  add_neighbours(y, kLanes / 4, z);
  add_neighbours(z, kLanes / 8, y);
  add_neighbours(y, kLanes / 16, z);
  return z[0] + z[1];
}

// The sums of neighbouring units of `width` <= kLanes columns each: the bits that 32 partial sums would give, missing ones being 0. Whole
// units whose width is a power of two are folded without a copy.
BIP_HD void fold_units(const float* columns, int count, int width, float* sums) {
  int padded = 1;
  while (padded < width) padded *= 2;
  float x[2 * kItemColumns], y[kItemColumns];
  const int units = (count + width - 1) / width;
  const float* from = columns;
  int size = units * padded;
  if (count < size) {
    std::fill_n(x, size, 0.0f);
    for (int i = 0, unit = 0; unit < units; ++unit)
      for (int j = 0; j < width && i < count; ++j) x[unit * padded + j] = columns[i++];
    from = x;
  }
  float *to = y, *other = x;
  for (; padded > 1; padded /= 2) {
    add_neighbours(from, size /= 2, to);
    from = to;
    std::swap(to, other);
  }
  std::copy_n(from, units, sums);
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
  template <bool kNew = false, class Kept>
  BIP_HD int add_row(int64_t row, int64_t col, int count, const Kept& is_kept, float* sums) const {
    float buffer[kItemColumns];
    const int64_t entry = row * part.cols + col;
    const float* g = gradients_of(gradient, {&tensor, entry, count}, buffer);
    return add_terms<kNew>(g, tensor.theta + entry, is_kept, count, scale, hyper, sums);
  }
};

// Whether each column of some neighbouring units is kept.
BIP_HD void spell_out(const Source& source, const Item& item, int count, int width, uint32_t* kept) {
  int shift = 0;
  while (1 << shift < width) ++shift;
  if (1 << shift == width && item.units <= kBlock) {
    const int64_t word = item.unit / kBlock, bit = item.unit % kBlock;
    const bool two = bit + item.units > kBlock;
    const uint32_t bits =
        static_cast<uint32_t>((source.mask[word] | (two ? static_cast<uint64_t>(source.mask[word + 1]) << 32 : 0)) >> bit);
    for (int i = 0; i < kItemColumns; ++i) kept[i] = bits >> (i >> shift & 31) & 1u;
    return;
  }
  for (int unit = 0; unit < item.units; ++unit) {
    const uint32_t bit = source.kept(item.unit + unit);
    for (int i = unit * width; i < std::min(count, (unit + 1) * width); ++i) kept[i] = bit;
  }
}

BIP_HD int sum_narrow(const Source& source, const Item& item, float* sums) {
  float columns[kItemColumns];
  uint32_t kept[kItemColumns];
  const int count = static_cast<int>(item.cols), width = static_cast<int>(source.part.block_cols);
  spell_out(source, item, count, width, kept);
  const auto is_kept = [&](int i) { return kept[i] != 0; };
  int nonfinite = source.add_row<true>(item.row, item.col, count, is_kept, columns);
  for (int64_t row = item.row + 1; row < item.row + item.rows; ++row) nonfinite += source.add_row(row, item.col, count, is_kept, columns);
  fold_units(columns, count, width, sums);
  return nonfinite;
}

BIP_HD int sum_wide(const Source& source, const Item& item, float* sums) {
  const int64_t width = source.part.block_cols;
  int nonfinite = 0;
  for (int unit = 0; unit < item.units; ++unit) {
    float lanes[kLanes] = {};
    const bool kept = source.kept(item.unit + unit);
    const int64_t end = std::min((unit + 1) * width, item.cols);
    for (int64_t col = unit * width; col < end; col += kItemColumns) {
      float columns[kItemColumns] = {};
      const int count = static_cast<int>(std::min<int64_t>(kItemColumns, end - col));
      for (int64_t row = item.row; row < item.row + item.rows; ++row)
        nonfinite += source.add_row(row, item.col + col, count, [=](int) { return kept; }, columns);
      for (int i = 0; i < count; i += kLanes)  // columns that do not exist add +0
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += columns[i + lane];
    }
    sums[unit] = add_in_pairs(lanes);
  }
  return nonfinite;
}

// Items [begin, end) of one part, numbered in it.
BIP_HD int64_t sum_part(const Context& context, const Part& part, int64_t begin, int64_t end) {
  const Step& step = context.step;
  const Tensor& units = step.tensors[step.unit_sets[part.set].tensor];
  const Tensor& tensor = step.tensors[part.tensor];
  const Gradient& gradient = step.gradients[part.tensor];
  const Source source{tensor, gradient, part, step.hypers[tensor.hyper], units.mask, context.scale};
  const int64_t across = units_across(part), width = units_in_item(part), strips = strips_of(part);
  int64_t nonfinite = 0;
  Item item(part, begin);
  for (int64_t number = begin; number < end; ++number, item.advance(part, across, width, strips)) {
    if (item.rows == 0) continue;
    float* sums = part.sums + item.strip * units.numel + item.unit;
    if (!gradient.data)
      std::fill_n(sums, item.units, not_a_number());
    else
      nonfinite += part.block_cols <= kLanes ? sum_narrow(source, item, sums) : sum_wide(source, item, sums);
  }
  return step.tensors[part.tensor].elsewhere ? 0 : nonfinite;
}

BIP_HD void sum_items_body(Context& context, int64_t begin, int64_t end) {
  const Step& step = context.step;
  const Part* const last = step.parts + step.num_parts;
  const Part* part = std::upper_bound(step.parts, last, begin, [](int64_t number, const Part& p) { return number < p.first_item; }) - 1;
  int64_t nonfinite = 0;
  for (; begin < end; ++part) {
    const int64_t stop = part + 1 < last ? std::min(end, part[1].first_item) : end;
    nonfinite += sum_part(context, *part, begin - part->first_item, stop - part->first_item);
    begin = stop;
  }
  if (nonfinite) context.nonfinite.fetch_add(nonfinite);
}

BIP_SIMD_VARIANTS(sum_items, (Context & context, int64_t begin, int64_t end), (context, begin, end))

// The largest key of a tile of units, without those that are lifted already (kNeeded) or have no score (NaN); 0 if there is none. It looks
// for the largest score first, then for the largest tie key among equals.
BIP_HD uint64_t best_key(const Tensor& units, int64_t tile) {
  const int64_t begin = tile * kTile;
  const int count = static_cast<int>(std::min(kTile, units.numel - begin));
  const float* scores = units.scores + begin;
  float best = -1.0f;
  for (int i = 0; i < count; ++i) best = scores[i] > best && scores[i] < kNeeded ? scores[i] : best;
  uint32_t tie = 0;
  if (units.row_length) {
    for (int i = 0; i < count; ++i)
      tie = std::max(tie, scores[i] == best ? tie_key(static_cast<uint32_t>(index_of(units, begin + i))) : 0u);
  } else {
    const uint32_t first = static_cast<uint32_t>(units.index + begin);
    for (int i = 0; i < count; ++i) tie = std::max(tie, scores[i] == best ? tie_key(first + static_cast<uint32_t>(i)) : 0u);
  }
  return best < 0.0f ? 0 : static_cast<uint64_t>(score_key(best)) << 32 | tie;
}

// Moves `count` scores s (and momenta u, if there are any) by their sums h; those whose sum is NaN stay.
BIP_HD void move_scores(const Hyper& hyper, int count, const float* __restrict h, float* __restrict s, float* __restrict u) {
  if (u) {
    for (int i = 0; i < count; ++i) {
      const float moved = hyper.mask_momentum * u[i] + h[i];
      s[i] = h[i] == h[i] ? updated_score(s[i], moved, hyper) : s[i];
      u[i] = h[i] == h[i] ? moved : u[i];
    }
  } else {
    for (int i = 0; i < count; ++i) s[i] = h[i] == h[i] ? updated_score(s[i], h[i], hyper) : s[i];
  }
}

BIP_HD void score_tiles_body(const Step& step, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const UnitSet& set = step.unit_sets[step.tile_tensor[number] - step.unit_sets[0].tensor];
    const Tile tile = tile_of(step, number);
    const Tensor& units = *tile.tensor;
    const Hyper hyper = step.hypers[set.hyper];
    std::copy_n(units.mask + tile.begin / kBlock, (tile.count + kBlock - 1) / kBlock, set.before + tile.begin / kBlock);
    alignas(64) float h[kTile] = {};
    for (int64_t strip = 0; strip < set.strips; ++strip) {
      const float* sums = set.sums + strip * units.numel + tile.begin;
      for (int i = 0; i < tile.count; ++i) h[i] += sums[i];
    }
    const bool moves_momentum = set.score_momentum && hyper.mask_momentum > 0.0f;
    move_scores(hyper, tile.count, h, set.scores + tile.begin, moves_momentum ? set.score_momentum + tile.begin : nullptr);
    std::copy_n(set.scores + tile.begin, tile.count, units.scores + tile.begin);
    if (set.min_kept) set.best[tile.begin / kTile] = best_key(units, tile.begin / kTile);
  }
}

BIP_SIMD_VARIANTS(score_tiles, (const Step& step, int64_t begin, int64_t end), (step, begin, end))

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
  parallel_for(threads, step.unit_tile_end - first, kGrain,
               [&](int64_t begin, int64_t end) { score_tiles(step, first + begin, first + end); });
}

uint64_t best_unit(const Step& step, const UnitSet& set) {
  const int64_t tiles = (step.tensors[set.tensor].numel + kTile - 1) / kTile;
  return tiles ? *std::max_element(set.best, set.best + tiles) : 0;
}

void lift_unit(const Step& step, const UnitSet& set, uint64_t key) {
  const Tensor& units = step.tensors[set.tensor];
  uint64_t* const end = set.best + (units.numel + kTile - 1) / kTile;
  uint64_t* const best = std::find(set.best, end, key);
  if (key == 0 || best == end) return;
  int64_t unit = (best - set.best) * kTile;
  while (key_of(units, unit) != key) ++unit;
  units.scores[unit] = kNeeded;
  *best = best_key(units, best - set.best);
}

void lift_units(const Step& step, int threads) {
  parallel_for(threads, step.num_unit_sets, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const UnitSet& set = step.unit_sets[i];
      for (int32_t lifted = 0; lifted < set.min_kept; ++lifted) lift_unit(step, set, best_unit(step, set));
    }
  });
}

// One thread has a whole tensor, because neighbouring units share mask words.
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
