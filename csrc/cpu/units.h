// What a step does for units besides the selection among them: before it sums and scores, after it the weights.
#pragma once

#include <cstdint>

#include "bip.h"

namespace bip::cpu {

// Writes the sums of all strips. `scale` multiplies gradients. Returns the number of gradients that are not finite.
int64_t sum_units(const Step& step, float scale, int threads);

// Moves u and s of all units by their sums, notes the mask they have, and leaves the scores that the selection sees.
void score_units(const Step& step, int threads);

// Gives the weights of every unit that has flipped their mask bit and z.
void spread_units(const Step& step, int threads);

}  // namespace bip::cpu
