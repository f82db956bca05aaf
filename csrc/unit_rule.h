// Units: weights that share a score and a mask bit (filters, channels, blocks). This file decides the order in which their terms are
// summed, so that every backend and bip_fast/reference.py find the same bits.
//
//   h_unit = sum of (theta_j - m*g_j/gamma)*g_j over its members, in fp32 and in this order:
//     strip    at most kStrip rows of a unit. In each column its terms are added from the first row to the last;
//     lanes    column j adds to partial sum j mod 32, in ascending order of j; the 32 are then added in pairs of neighbours, five times;
//     unit     the sums of its strips, from the first to the last; of its parts, in their order.
//   Every sum starts from +0. A term whose gradient is not finite is NaN, and a unit whose sum is NaN keeps its score.
#pragma once

#include <cstdint>

#include "bip.h"
#include "hd.h"
#include "update_rule.h"

namespace bip {

constexpr int64_t kStrip = 64;
constexpr int kLanes = 32;         // partial sums
constexpr int kItemColumns = 128;  // of an item, unless one unit has more

BIP_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BIP_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

BIP_HD int64_t units_across(const Part& part) { return ceil_div(part.cols, part.block_cols); }
BIP_HD int64_t strips_of(const Part& part) { return ceil_div(smaller(part.block_rows, part.rows), kStrip); }

// Units in an item: neighbours in one strip.
BIP_HD int64_t units_in_item(const Part& part) { return part.block_cols < kItemColumns ? kItemColumns / part.block_cols : 1; }

inline int64_t num_items(const Part& part) {
  return ceil_div(part.rows, part.block_rows) * strips_of(part) * ceil_div(units_across(part), units_in_item(part));
}

// A piece of work: one strip of a few neighbouring units, which are summed together.
struct Item {
  int64_t window, strip, down;
  int64_t row, rows;  // at the far edge `rows` may be 0
  int64_t col, cols;
  int64_t unit;  // the first
  int units;

  BIP_HD Item(const Part& part, int64_t number) {
    const int64_t windows = ceil_div(units_across(part), units_in_item(part)), strips = strips_of(part);
    window = number % windows;
    strip = number / windows % strips;
    down = number / windows / strips;
    place(part, units_across(part), units_in_item(part));
  }

  // The item after this one, without a division.
  BIP_HD void advance(const Part& part, int64_t across, int64_t width, int64_t strips) {
    if (++window * width >= across) {
      window = 0;
      if (++strip == strips) {
        strip = 0;
        ++down;
      }
    }
    place(part, across, width);
  }

 private:
  BIP_HD void place(const Part& part, int64_t across, int64_t width) {
    const int64_t begin = down * part.block_rows + strip * kStrip;
    const int64_t end = smaller(smaller(begin + kStrip, (down + 1) * part.block_rows), part.rows);
    row = begin;
    rows = end > begin ? end - begin : 0;
    units = static_cast<int>(smaller(width, across - window * width));
    unit = down * across + window * width;
    col = window * width * part.block_cols;
    cols = smaller(units * part.block_cols, part.cols - col);
  }
};

// The weights of one unit.
struct Extent {
  int64_t row, rows;
  int64_t col, cols;

  BIP_HD Extent(const Part& part, int64_t unit) {
    const int64_t across = units_across(part);
    row = unit / across * part.block_rows;
    col = unit % across * part.block_cols;
    rows = smaller(part.block_rows, part.rows - row);
    cols = smaller(part.block_cols, part.cols - col);
  }
};

BIP_HD float not_a_number() {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(0x7fc00000u);
#else
  const uint32_t bits = 0x7fc00000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

BIP_HD float term(bool kept, float g, float theta, const Hyper& hyper) {
  return is_finite(g) ? score_gradient(kept, g, theta, hyper) : not_a_number();
}

// In the selection, a unit that its layer must keep (min_kept) has this score, which is above every other.
constexpr float kNeeded = 2.0f;

}  // namespace bip
