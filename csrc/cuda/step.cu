// The lower, upper and joint step on a CUDA device: one streaming skeleton, one warp per tile of 1024 entries of one tensor.
//
//   lower  1 launch    update (update.cuh): weights, by the rule of the optimizer                       24.1 bytes per fp32 weight
//   upper  2 launches  update: scores, judged at once against the window of the step before            16.3
//                      finish: returns at once in most steps
//   joint  2 launches  update: both; then as upper                                                     28.3 to 32.3
//   With AdamW 8 bytes more in lower and joint steps. With an optimizer of the caller's these write m*g instead of theta, v and z, and a
//   launch more writes z when that optimizer has moved theta.
//   Up to kAloneTiles tiles the first launch does everything.
//   1 more for every 400 gradient pointers beyond the first 400.
//
// The block that completes a group in the update knows whether the window held its k-th key (conclude.cuh). If so, it settles the
// candidates, or leaves them to `finish` where they are many. If not, the group falls back: the finish counts first digits of its scores,
// then second ones, and judges by the window they give. That costs 12.1 bytes more per weight. Nothing returns to the host.
// The mask changes in two places: judge_near (judge.cuh) while streaming, repair (conclude.cuh) candidate by candidate.
// Whatever the path and the grid, a group's mask is the top-k of its scores by unique keys. A tensor's entries are written by one
// warp only until its group is complete, and then by the block that completed it or by the finish.
#include "conclude.cuh"
#include "launch.cuh"
#include "units.cuh"
#include "update.cuh"

namespace bip::cuda {
namespace {

__device__ __forceinline__ bool skipped(const Step& step) { return step.found_inf && *step.found_inf != 0.0f; }

__device__ __forceinline__ float inverse_of(const float* scale) { return scale ? 1.0f / *scale : 1.0f; }

// Tiles of one block that one histogram serves: all pruned ones are of `group` (-1: there are none).
struct Run {
  int begin, end;
  int group;
};

// The run that starts at `begin`. Every warp finds it for itself, a tensor per lane: no barrier, and the tables are in the cache.
__device__ Run next_run(const Step& step, int begin, int end) {
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

// What Rule::adamw has in shared memory: the factors of every warp's tile, and whether the block is the last one.
struct AdamwRoom {
  AdamwFactors factors[kWarps];
  bool last;
};

// One warp moves one tile, and judges it. `factors`: of the warp, for Rule::adamw.
template <Phase kPhase, Rule kRule, class AnyRoom>
__device__ __forceinline__ void update_number(const Args& args, const GradientTable& table, int number, float inverse_scale, AnyRoom& room,
                                              Sums& sums, AdamwFactors* factors) {
  const Step& step = args.step;
  const int which = step.tile_tensor[number];
  const Gradient gradient = gradient_of(args, table, which);
  const Tile tile(step, number);
  if constexpr (kPhase != Phase::lower) {
    if (tile.tensor.group >= 0) note_entries(room, tile.entries);
    if (kPhase == Phase::upper && !tile.tensor.scores) return;
  }
  if (gradient.data) {
    if constexpr (kRule == Rule::adamw) {
      __syncwarp();  // no lane uses those of the tile before any more
      if (lane_id() == 0) *factors = adamw_factors(step.hypers[tile.tensor.hyper], *tile.tensor.steps + 1);
      __syncwarp();
    }
    const int quad_bytes = gradient.dtype == DType::f32 ? 16 : 8;
    const Job job{tile,           step.hypers[tile.tensor.hyper],
                  inverse_scale,  gradient.data,
                  gradient.dtype, reinterpret_cast<uintptr_t>(gradient.data) % quad_bytes == 0,
                  factors};
    update_tile<kPhase, kRule>(job, room, sums);
  } else {
    if constexpr (kPhase != Phase::lower) {
      if (tile.tensor.of != 0)
        keep_tile(tile);
      else if (tile.tensor.group >= 0 && room.group.capacity != 0)
        judge_tile(room, sums.above, tile);
    }
  }
}

__device__ __forceinline__ void report_nonfinite(const Step& step, const Sums& sums) {
  const uint32_t nonfinite = sum_of_warp(sums.nonfinite);
  if (lane_id() == 0 && nonfinite)
    atomicAdd(reinterpret_cast<unsigned long long*>(step.num_nonfinite), static_cast<unsigned long long>(nonfinite));
}

// Whole block, through with its tiles: the last one of the grid counts the step of every tensor that has a gradient. By then all have read
// the counts: a block publishes that it is through after its reads.
__device__ __noinline__ void count_steps(const Args& args, const GradientTable& table, bool& last) {
  __syncthreads();
  if (thread_id() == 0) {
    fence();
    last = atomicAdd(&args.workspace.queue->through, 1u) + 1 == gridDim.x;
    fence();
  }
  __syncthreads();
  if (!last) return;
  for (int i = thread_id(); i < args.step.num_tensors; i += kThreads)
    if (args.step.tensors[i].steps && gradient_of(args, table, i).data) ++*args.step.tensors[i].steps;
  if (thread_id() == 0) args.workspace.queue->through = 0;
}

// Memory does not serve all processors alike, and those that are done early would wait for the others: 6 % of a step of 25 million weights on
// an H200. So the last tiles of a launch are free: a warp that has done its share takes the next one, and the next.
constexpr int kFreePart = 4;  // of all tiles, one in so many
constexpr int kFreeFrom = 2;  // tiles for each warp, on average: for fewer, asking for the next costs more

// The tiles of a launch from `begin` on that are free; none without a counter.
struct FreeTiles {
  uint32_t* taken;
  int begin, end;

  FreeTiles() = default;
  __device__ __forceinline__ FreeTiles(const Args& args, int64_t tiles, bool any)
      : taken(any && tiles >= kFreeFrom * static_cast<int64_t>(gridDim.x) * kWarps ? &args.workspace.queue->taken : nullptr),
        begin(static_cast<int>(taken ? tiles - tiles / kFreePart : tiles)),
        end(static_cast<int>(tiles)) {}
};

// Whole warp: calls body(number) for its tiles of the block's share, then for the free ones it gets. Every warp of the grid asks for those
// until there is none, and the one that asks last puts the counter back.
template <class AnyRange, class Body>
__device__ __forceinline__ void for_warp_tiles(const AnyRange& share, const FreeTiles& free, Body body) {
  uint32_t ticket = 0;
  const auto ask = [&]() {
    if (lane_id() == 0) ticket = atomicAdd(free.taken, 1u);
  };
  const auto answer = [&]() { return free.begin + static_cast<int>(__shfl_sync(kAllLanes, ticket, 0)); };
  int number = share.begin + warp_id();
  if (free.taken && number >= share.end) {
    ask();
    number = answer();
  }
  while (number < (free.taken ? free.end : share.end)) {
    const bool more = !free.taken || number + kWarps < share.end;
    if (!more) ask();  // the answer comes while the tile is worked on
    body(number);
    number = more ? number + kWarps : answer();
  }
  if (free.taken && lane_id() == 0 && ticket + 1 == static_cast<uint32_t>(free.end - free.begin) + gridDim.x * kWarps) *free.taken = 0;
}

struct StreamRoom : JudgeRoom {
  Run run;  // that the block is at
  int end;  // of the block's share of tiles
  FreeTiles free;
  float inverse_scale;
};

// One block per contiguous share of the tiles, in runs of one group. Where there is only one group, a share is one run, and the last tiles
// are free.
template <Phase kPhase, Rule kRule>
__device__ __forceinline__ void update_and_judge(const Args& args, const GradientTable& table, StreamRoom& room, AdamwRoom* adamw) {
  const Step& step = args.step;
  AdamwFactors* factors = adamw ? &adamw->factors[warp_id()] : nullptr;
  if (skipped(step)) return;
  const bool single = step.num_groups == 1 && !args.workspace.alone;
  if (thread_id() == 0) {
    room.free = FreeTiles(args, kPhase == Phase::upper ? step.num_scored_tiles : step.num_tiles, single);
    const Range share = block_range(room.free.begin);
    room.run = {share.begin, single ? share.end : share.begin, single ? 0 : -1};
    room.end = share.end;
    room.inverse_scale = inverse_of(step.grad_scale);
    room.entries = room.above = 0;
  }
  __syncthreads();
  Sums sums;
  for (bool begun = false; single ? !begun : room.run.end < room.end; begun = true) {
    if (!single) {
      const Run run = next_run(step, room.run.end, room.end);
      __syncthreads();
      if (thread_id() == 0) room.run = run;
      __syncthreads();
    }
    const int group = room.run.group;
    if (group >= 0) {
      // Read before this block publishes any entry of the group, so before the last block replaces it. A block that gets no entry may read
      // what the last one is writing: it has nothing to judge by it.
      const Guess guess = guess_of(args, group);
      begin_judging(room, guess.window, state_of(args, group).progress, candidates_of(args, group),
                    guess.known ? capacity_of(args, group) : 0);
      sums.above = 0;
    }
    for_warp_tiles(room.run, room.free,
                   [&](int number) { update_number<kPhase, kRule>(args, table, number, room.inverse_scale, room, sums, factors); });
    if (room.run.group < 0) continue;  // nothing is selected: N:M tensors, and in a joint step those without scores
    end_judging(room, sums.above);
    report_flips(room, step.counters[room.run.group]);
    if (publish_is_last(room, state_of(args, room.run.group).progress, numel_of(args, room.run.group)))
      conclude(args, room, room.run.group);
  }
  report_nonfinite(step, sums);
  if (kRule == Rule::adamw) count_steps(args, table, adamw->last);
}

// One thread per gradient pointer that did not fit into the parameters of the update.
__global__ void __launch_bounds__(kThreads) step_gradients_kernel(const GradientTable __grid_constant__ table, Gradient* to, int count) {
  for (int i = thread_id(); i < count; i += kThreads) to[i] = {table.data[i], static_cast<DType>(table.dtype[i]), 0};
}

// One warp per tile.
template <Rule kRule>
__device__ __forceinline__ void update_lower(const Args& args, const GradientTable& table, AdamwRoom* adamw) {
  if (skipped(args.step)) return;
  const float inverse_scale = inverse_of(args.step.grad_scale);
  const FreeTiles free(args, args.step.num_tiles, true);
  AdamwFactors* factors = adamw ? &adamw->factors[warp_id()] : nullptr;
  Nothing nothing;
  Sums sums;
  for_warp_tiles(block_range(free.begin), free,
                 [&](int number) { update_number<Phase::lower, kRule>(args, table, number, inverse_scale, nothing, sums, factors); });
  report_nonfinite(args.step, sums);
  if (kRule == Rule::adamw) count_steps(args, table, adamw->last);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_lower_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  update_lower<Rule::sgd>(args, table, nullptr);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorJoint)
    step_lower_adamw_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ AdamwRoom adamw;
  update_lower<Rule::adamw>(args, table, &adamw);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_lower_gradient_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  update_lower<Rule::gradient>(args, table, nullptr);
}

// One warp per tile: z = m*theta.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_mask_kernel(const Args __grid_constant__ args) {
  if (skipped(args.step)) return;
  const Range share = block_range(args.step.num_tiles);
  for (int number = share.begin + warp_id(); number < share.end; number += kWarps) mask_tile(Tile(args.step, number));
}

// One warp per item of units. In a joint step the update counts the gradients that are not finite.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorJoint)
    step_sums_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ float columns[kWarps][kItemColumns];
  if (skipped(args.step)) return;
  Sums sums;
  const uint32_t nonfinite = sum_items(args, table, inverse_of(args.step.grad_scale), columns[warp_id()]);
  if (args.step.phase == Phase::upper) sums.nonfinite = nonfinite;
  report_nonfinite(args.step, sums);
}

// One warp per tile of units.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_scores_kernel(const Args __grid_constant__ args) {
  if (!skipped(args.step)) score_units(args.step);
}

// One warp per mask word of units.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_spread_kernel(const Args __grid_constant__ args) {
  if (!skipped(args.step)) spread_units(args.step);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_upper_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ StreamRoom room;
  update_and_judge<Phase::upper, Rule::none>(args, table, room, nullptr);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorJoint)
    step_joint_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ StreamRoom room;
  update_and_judge<Phase::joint, Rule::sgd>(args, table, room, nullptr);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorJoint)
    step_joint_adamw_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ StreamRoom room;
  __shared__ AdamwRoom adamw;
  update_and_judge<Phase::joint, Rule::adamw>(args, table, room, &adamw);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorJoint)
    step_joint_gradient_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ StreamRoom room;
  update_and_judge<Phase::joint, Rule::gradient>(args, table, room, nullptr);
}

// Calls body(run, group's state) for the runs of this block whose group falls back.
template <class Body>
__device__ __forceinline__ void for_falling_runs(const Args& args, Body body) {
  const Range share = block_range(args.step.num_scored_tiles);
  for (int begin = share.begin; begin < share.end;) {
    const Run run = next_run(args.step, begin, share.end);
    begin = run.end;
    if (run.group >= 0 && state_of(args, run.group).task == Task::fall_back) body(run, state_of(args, run.group));
  }
}

// Calls body(tile) for the pruned tiles of a run, a warp for each.
template <class Body>
__device__ __forceinline__ void for_tiles_in(const Args& args, Room& room, const Run& run, Body body) {
  for (int number = run.begin + warp_id(); number < run.end; number += kWarps) {
    const Tile tile(args.step, number);
    if (tile.tensor.group < 0) continue;
    body(tile);
    note_entries(room, tile.entries);
  }
}

// The contiguous share of the candidates of the `place`-th group to finish that belongs to this block: so many that few blocks have to publish
// their effects. Each group begins with another block, so that many of them keep many blocks busy.
__device__ __forceinline__ Range candidate_range(uint32_t candidates, uint32_t place) {
  constexpr uint32_t kLeast = 4 * kThreads;
  const int64_t needed = (candidates + kLeast - 1) / kLeast, blocks = needed < gridDim.x ? needed : gridDim.x;
  const int64_t block = (blockIdx.x + gridDim.x - 3 * place % gridDim.x) % gridDim.x;
  if (block >= blocks) return {0, 0};
  return {static_cast<int>(candidates * block / blocks), static_cast<int>(candidates * (block + 1) / blocks)};
}

// A block's share of the candidates of a group: counts them. The last block narrows the window to the bin of the k-th key.
__device__ __noinline__ void count_share(const Args& args, JudgeRoom& room, int group, uint32_t place) {
  GroupState& state = state_of(args, group);
  const Window judged = state.window;
  const Candidate* list = candidates_of(args, group);
  const Range share = candidate_range(judged.inside, place);
  if (share.begin == share.end) return;
  count_keys(room, list + share.begin, static_cast<uint32_t>(share.end - share.begin), judged, window_shift(judged));
  if (thread_id() == 0) {
    room.entries = static_cast<uint32_t>(share.end - share.begin);
    room.memory = state.memory;
  }
  if (!merge(room, args.workspace.histograms[group], state.progress, judged.inside)) return;
  const Window window = next_window(args, room, group, judged);
  if (thread_id() != 0) return;
  state.listed = judged.inside;
  state.window = window;
}

// The same share, after a barrier: candidates outside of that bin get their bit, the last block settles the others.
__device__ __noinline__ void finish_share(const Args& args, Room& room, int group, uint32_t place) {
  GroupState& state = state_of(args, group);
  const Window window = state.window;
  const uint32_t listed = state.listed;
  const Candidate* list = candidates_of(args, group);
  Candidate* few = few_of(args, group);
  const bool fits = window.inside <= few_capacity(args.step.groups[group].numel);
  const Range share = candidate_range(listed, place);
  if (share.begin == share.end) return;
  for (int i = share.begin + thread_id(); i < share.end; i += kThreads) {
    const Candidate candidate = list[i];
    if (candidate.key >= window.hi || candidate.key < window.lo)
      repair(args, group, candidate, candidate.key >= window.hi);
    else if (fits)
      few[atomicAdd(&state.progress.collected, 1u)] = candidate;
  }
  if (thread_id() == 0) room.entries = static_cast<uint32_t>(share.end - share.begin);
  if (!publish_is_last(room, state.progress, listed)) return;
  settle_group(args, room, group, fits ? few : list, fits ? window.inside : listed, window, window);
  __syncthreads();
}

// A group that falls back is listed when at most so many keys are inside its window: few enough for one block, or for a pass over a list
// that is cheaper than one over the scores.
__device__ __forceinline__ uint32_t listable(const Args& args, int group) {
  const uint32_t most = kAloneUpTo + numel_of(args, group) / 65536, capacity = capacity_of(args, group);
  return most < capacity ? most : capacity;
}

// Whole block, the last of a group in a counting pass: the group's new window, and whether it needs one more pass.
__device__ __forceinline__ void narrowed(const Args& args, int group, const Window& window, int round) {
  if (thread_id() != 0) return;
  state_of(args, group).window = window;
  if (window.inside > listable(args, group)) atomicAdd(&args.workspace.queue->open[round], 1u);
}

// Counts first digits of the scores of the groups that fall back.
__device__ __noinline__ void count_first_digits(const Args& args, Room& room) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    for_tiles_in(args, room, run, [&](const Tile& tile) { count_first(room, kScoreDigit, tile.tensor.scores + tile.first, tile.entries); });
    if (merge(room, args.workspace.histograms[run.group], state.progress, numel_of(args, run.group)))
      narrowed(args, run.group, narrow_first(room, args.step.groups[run.group], kScoreDigit, &state.memory), 0);
  });
}

// One more digit for those whose window has too many keys.
__device__ __noinline__ void count_next_digits(const Args& args, Room& room, int round) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    // Read before this block publishes any entry of the group, so before the last block can replace it.
    const Window window = state.window;
    if (window.inside <= listable(args, run.group)) return;
    const int shift = window_shift(window);
    for_tiles_in(args, room, run,
                 [&](const Tile& tile) { count_inside(room, window, shift, tile.tensor.scores + tile.first, tile.entries, tile.index()); });
    if (merge(room, args.workspace.histograms[run.group], state.progress, numel_of(args, run.group)))
      narrowed(args, run.group, narrow(room, window, shift, window.lo, &state.memory), round);
  });
}

// Judges the groups that fall back by the windows that were found; the block that completes one settles it.
__device__ __noinline__ void judge_again(const Args& args, JudgeRoom& room) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    begin_judging(room, state.window, state.progress, candidates_of(args, run.group), capacity_of(args, run.group));
    uint32_t num_above = 0;
    for_tiles_in(args, room, run, [&](const Tile& tile) { judge_tile(room, num_above, tile); });
    end_judging(room, num_above);
    report_flips(room, args.step.counters[run.group]);
    if (publish_is_last(room, state.progress, numel_of(args, run.group)))
      settle_group(args, room, run.group, room.group.list, room.group.window.inside, room.group.window, room.group.window);
  });
}

// What the update could not conclude, all blocks together, all of them resident: groups with many candidates are finished; those that fall
// back are narrowed, judged and settled, with barriers over the grid between. In most steps there is neither, and no barrier either.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_finish_kernel(const Args __grid_constant__ args) {
  __shared__ JudgeRoom room;
  if (skipped(args.step)) return;
  Queue& queue = *args.workspace.queue;
  const uint32_t finishing = queue.finishing, falling = queue.falling;
  if (finishing == 0 && falling == 0) return;
  clear(room);
  for (uint32_t i = 0; i < finishing; ++i) count_share(args, room, args.workspace.finish_list[i], i);
  if (falling != 0) count_first_digits(args, room);
  cooperative_groups::this_grid().sync();
  // After each round all blocks read the same count of open groups: those of the next round go to another place.
  for (int round = 0; round < kMaxRounds && queue.open[round] != 0; ++round) {
    count_next_digits(args, room, round + 1);
    cooperative_groups::this_grid().sync();
  }
  // All blocks have read all of the queue but the last count, which is 0.
  if (blockIdx.x == 0 && thread_id() == 0) queue = {};
  for (uint32_t i = 0; i < finishing; ++i) finish_share(args, room, args.workspace.finish_list[i], i);
  if (falling != 0) judge_again(args, room);
}

// The gradients [first, first + count) by value.
GradientTable table_of(const Gradient* gradients, int64_t first, int64_t count) {
  GradientTable table{};
  for (int64_t i = 0; i < count; ++i) {
    table.data[i] = gradients[first + i].data;
    table.dtype[i] = static_cast<uint8_t>(gradients[first + i].dtype);
  }
  return table;
}

void lower(const Args& args, const GradientTable& table, void* stream) {
  const int64_t tiles = args.step.num_tiles;
  switch (args.step.rule) {
    case Rule::none: return launch<step_mask_kernel>("step", "step_mask_kernel", tiles, stream, args);
    case Rule::sgd: return launch<step_lower_kernel>("step", "step_lower_kernel", tiles, stream, args, table);
    case Rule::adamw: return launch<step_lower_adamw_kernel>("step", "step_lower_adamw_kernel", tiles, stream, args, table);
    case Rule::gradient: return launch<step_lower_gradient_kernel>("step", "step_lower_gradient_kernel", tiles, stream, args, table);
  }
}

void joint(const Args& args, const GradientTable& table, void* stream) {
  const int64_t tiles = args.step.num_tiles;
  switch (args.step.rule) {
    case Rule::none: break;
    case Rule::sgd: return launch<step_joint_kernel>("step", "step_joint_kernel", tiles, stream, args, table);
    case Rule::adamw: return launch<step_joint_adamw_kernel>("step", "step_joint_adamw_kernel", tiles, stream, args, table);
    case Rule::gradient: return launch<step_joint_gradient_kernel>("step", "step_joint_gradient_kernel", tiles, stream, args, table);
  }
}

}  // namespace

int64_t step_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles) {
  return lay_out(nullptr, num_tensors, num_groups, num_scored_tiles, nullptr);
}

void step(const Step& step, void* stream) {
  if (step.num_tiles == 0) return;
  Args args{step, {}};
  lay_out(static_cast<char*>(step.workspace), step.num_tensors, step.num_groups, step.num_scored_tiles, &args.workspace);
  for (int64_t first = kInlineGradients; first < step.num_tensors; first += kInlineGradients) {
    const int64_t count = std::min<int64_t>(step.num_tensors - first, kInlineGradients);
    launch<step_gradients_kernel>("step", "step_gradients_kernel", 1, stream, table_of(step.gradients, first, count),
                                  args.workspace.gradients + (first - kInlineGradients), static_cast<int>(count));
  }
  const GradientTable table = table_of(step.gradients, 0, std::min<int64_t>(step.num_tensors, kInlineGradients));
  if (step.phase == Phase::lower) return lower(args, table, stream);
  const int64_t unit_tiles = step.unit_tile_end - step.unit_tile_begin;
  if (unit_tiles) {
    launch<step_sums_kernel>("step", "step_sums_kernel", step.num_items, stream, args, table);
    launch<step_scores_kernel>("step", "step_scores_kernel", unit_tiles, stream, args);
  }
  if (step.phase == Phase::upper)
    launch<step_upper_kernel>("step", "step_upper_kernel", step.num_scored_tiles, stream, args, table);
  else
    joint(args, table, stream);
  if (step.num_groups != 0 && !args.workspace.alone) {
    launch_together<step_finish_kernel>("step", "step_finish_kernel", step.num_scored_tiles, stream, args);
  }
  if (unit_tiles) launch<step_spread_kernel>("step", "step_spread_kernel", unit_tiles * (kTile / kWarp), stream, args);
}

}  // namespace bip::cuda
