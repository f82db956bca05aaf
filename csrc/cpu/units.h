// What a step does for units besides the selection among them: before it sums and scores, after it the weights.
#pragma once

#include <cstdint>

#include "bip.h"

namespace bip::cpu {

// Writes the sums of all strips. `scale` multiplies gradients. Returns the number of gradients that are not finite.
int64_t sum_units(const Step& step, float scale, int threads);

// Moves u and s of all units by their sums, notes the mask they have, and leaves the scores that the selection sees and, where a set has a
// least number of kept units, the best key of each tile.
void score_units(const Step& step, int threads);

// Lifts the best `min_kept` units of every set above all others.
void lift_units(const Step& step, int threads);

// The best key of a set that is not lifted yet; 0 if there is none.
uint64_t best_unit(const Step& step, const UnitSet& set);

// Lifts the unit of this key, if the set has it as its best.
void lift_unit(const Step& step, const UnitSet& set, uint64_t key);

// Gives the weights of every unit that has flipped their mask bit and z.
void spread_units(const Step& step, int threads);

}  // namespace bip::cpu
