// The part of CUDA's cooperative groups that the project uses: one barrier over the grid.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const { sim::grid_barrier(file, line); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
