// The tiles of a block, in runs of one selection group.
#pragma once

#include "tile.cuh"
#include "workspace.cuh"

namespace bip::cuda {

__device__ __forceinline__ bool skipped(const Step& step) { return step.found_inf && *step.found_inf != 0.0f; }

// Tiles of one block that one histogram serves: all pruned ones are of `group` (-1: there are none).
struct Run {
  int begin, end;
  int group;
};

// The run that starts at `begin`. Every warp finds it for itself, a tensor per lane: no barrier, and the tables are in the cache.
__device__ inline Run next_run(const Step& step, int begin, int end) {
  int group = -1;
  for (int64_t first = step.tile_tensor[begin];; first += kWarp) {
    const int64_t which = first + lane_id();
    const bool inside = which < step.num_tensors && step.tensors[which].first_tile < end;
    const int mine = inside && step.tensors[which].numel > 0 ? step.tensors[which].group : -1;
    const unsigned pruned = __ballot_sync(kAllLanes, mine >= 0);
    if (pruned != 0 && group < 0) group = __shfl_sync(kAllLanes, mine, __ffs(static_cast<int>(pruned)) - 1);
    const unsigned other = __ballot_sync(kAllLanes, mine >= 0 && mine != group);
    if (other != 0) {
      const int start = inside ? static_cast<int>(step.tensors[which].first_tile) : 0;
      return {begin, __shfl_sync(kAllLanes, start, __ffs(static_cast<int>(other)) - 1), group};
    }
    if (__ballot_sync(kAllLanes, inside) != kAllLanes) return {begin, end, group};
  }
}

// Calls body(run) for the runs of this block that have a group.
template <class Body>
__device__ __forceinline__ void for_runs(const Args& args, Body body) {
  const Range share = block_range(args.step.num_scored_tiles);
  for (int begin = share.begin; begin < share.end;) {
    const Run run = next_run(args.step, begin, share.end);
    begin = run.end;
    if (run.group >= 0) body(run);
  }
}

// Calls body(tile) for the pruned tiles of a run, a warp for each.
template <class Body>
__device__ __forceinline__ void for_tiles_in(const Args& args, const Run& run, Body body) {
  for (int number = run.begin + warp_id(); number < run.end; number += kWarps) {
    const Tile tile(args.step, number);
    if (tile.tensor.group >= 0) body(tile);
  }
}

}  // namespace bip::cuda
