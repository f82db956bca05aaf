// What goes over all entries of a step, a warp for each tile of 1024 of one tensor: the kernels of lower, upper and joint steps.
//
// After an upper or joint pass the block that completes a group concludes it (conclude.cuh), where all its entries are here. Where others are
// on other ranks, the pass only counts what it has judged, and shards.cu goes on.
#include "conclude.cuh"
#include "launch.cuh"
#include "pass.cuh"
#include "runs.cuh"
#include "units.cuh"
#include "update.cuh"

namespace bip::cuda {
namespace {

__device__ __forceinline__ float inverse_of(const float* scale) { return scale ? 1.0f / *scale : 1.0f; }

// What Rule::adamw has in shared memory: the factors of every warp's tile, and whether the block is the last one.
struct AdamwRoom {
  AdamwFactors factors[kWarps];
  bool last;
};

__device__ __forceinline__ void report_nonfinite(const Step& step, const Sums& sums) {
  const uint32_t nonfinite = sum_of_warp(sums.nonfinite);
  if (lane_id() == 0 && nonfinite)
    atomicAdd(reinterpret_cast<unsigned long long*>(step.num_nonfinite), static_cast<unsigned long long>(nonfinite));
}

// Whole warp: adds up what it has counted so far, and begins anew. A call, so that what it needs takes no registers from the streaming loop.
template <class AnyRoom>
__device__ __noinline__ Sums set_aside(const Step& step, AnyRoom& room, Sums sums) {
  report_nonfinite(step, sums);
  if constexpr (!std::is_same_v<AnyRoom, Nothing>) {
    const uint32_t above = sum_of_warp(sums.above);
    if (lane_id() == 0 && above) atomicAdd(&room.above, above);
  }
  return {};
}

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
      if (tile.tensor.of != 0 && !tile.tensor.row_length)
        keep_tile<false>(tile);
      else if (tile.tensor.group >= 0 && room.group.capacity != 0 && !tile.tensor.row_length)
        judge_tile(room, sums.above, tile);
    }
  }
}

// The same for a tile of which other ranks may have more: the same entries, which they count, or other columns. The table is asked again
// afterwards, as registers are scarce.
template <Phase kPhase, Rule kRule, class AnyRoom>
__device__ __forceinline__ void update_and_count(const Args& args, const GradientTable& table, int number, float inverse_scale,
                                                 AnyRoom& room, Sums& sums, AdamwFactors* factors) {
  const Step& step = args.step;
  const auto tensor = [&]() -> const Tensor& { return step.tensors[step.tile_tensor[number]]; };
  if (tensor().elsewhere) sums = set_aside(step, room, sums);
  update_number<kPhase, kRule>(args, table, number, inverse_scale, room, sums, factors);
  if constexpr (kPhase != Phase::lower) {
    if (tensor().row_length && tensor().of != 0)
      keep_columns(step, number);
    else if (tensor().row_length && tensor().group >= 0 && room.group.capacity != 0)
      sums.above += judge_columns(room, step, number);
  }
  if (tensor().elsewhere) sums = {};
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
                   [&](int number) { update_and_count<kPhase, kRule>(args, table, number, room.inverse_scale, room, sums, factors); });
    if (room.run.group < 0) continue;  // nothing is selected: N:M tensors, and in a joint step those without scores
    end_judging(room, sums.above);
    report_flips(room, step.counters[room.run.group]);
    if (args.workspace.searches)
      publish(room, state_of(args, room.run.group).progress);
    else if (publish_is_last(room, state_of(args, room.run.group).progress, entries_of(args, room.run.group)))
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
                 [&](int number) { update_and_count<Phase::lower, kRule>(args, table, number, inverse_scale, nothing, sums, factors); });
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

// One warp per item of units, and when all sums are there one per tile of units. In a joint step the update counts the gradients that are not
// finite.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorJoint)
    step_scores_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ float columns[kWarps][kItemColumns];
  if (skipped(args.step)) return;
  Sums sums;
  const uint32_t nonfinite = sum_items(args, table, inverse_of(args.step.grad_scale), columns[warp_id()]);
  if (args.step.phase == Phase::upper) sums.nonfinite = nonfinite;
  report_nonfinite(args.step, sums);
  wait_for_all();
  score_units(args.step, args.workspace.searches == nullptr);
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

// The gradients [first, first + count) by value.
GradientTable table_of(const Gradient* gradients, int64_t first, int64_t count) {
  GradientTable table{};
  for (int64_t i = 0; i < count; ++i) {
    table.data[i] = gradients[first + i].data;
    table.dtype[i] = static_cast<uint8_t>(gradients[first + i].dtype);
  }
  return table;
}

}  // namespace

Pass::Pass(const Step& step, Search* searches, void* stream)
    : args_{step, {}}, table_(table_of(step.gradients, 0, std::min<int64_t>(step.num_tensors, kInlineGradients))), stream_(stream) {
  lay_out(static_cast<char*>(step.workspace), step.num_tensors, step.num_groups, step.num_scored_tiles, &args_.workspace);
  args_.workspace.searches = searches;
  args_.workspace.alone = args_.workspace.alone && !searches;
}

void Pass::launch_gradients() const {
  const Step& step = args_.step;
  for (int64_t first = kInlineGradients; first < step.num_tensors; first += kInlineGradients) {
    const int64_t count = std::min<int64_t>(step.num_tensors - first, kInlineGradients);
    launch<step_gradients_kernel>("step", "step_gradients_kernel", 1, stream_, table_of(step.gradients, first, count),
                                  args_.workspace.gradients + (first - kInlineGradients), static_cast<int>(count));
  }
}

void Pass::launch_scores() const {
  if (has_units()) launch_together<step_scores_kernel>("step", "step_scores_kernel", args_.step.num_items, stream_, args_, table_);
}

void Pass::launch_update() const {
  switch (args_.step.phase) {
    case Phase::lower: return launch_lower();
    case Phase::upper: return launch<step_upper_kernel>("step", "step_upper_kernel", args_.step.num_scored_tiles, stream_, args_, table_);
    case Phase::joint: return launch_joint();
  }
}

void Pass::launch_spread() const {
  if (has_units()) launch<step_spread_kernel>("step", "step_spread_kernel", unit_words(), stream_, args_);
}

void Pass::launch_lower() const {
  const int64_t tiles = args_.step.num_tiles;
  switch (args_.step.rule) {
    case Rule::none: return launch<step_mask_kernel>("step", "step_mask_kernel", tiles, stream_, args_);
    case Rule::sgd: return launch<step_lower_kernel>("step", "step_lower_kernel", tiles, stream_, args_, table_);
    case Rule::adamw: return launch<step_lower_adamw_kernel>("step", "step_lower_adamw_kernel", tiles, stream_, args_, table_);
    case Rule::gradient: return launch<step_lower_gradient_kernel>("step", "step_lower_gradient_kernel", tiles, stream_, args_, table_);
  }
}

void Pass::launch_joint() const {
  const int64_t tiles = args_.step.num_tiles;
  switch (args_.step.rule) {
    case Rule::none: break;
    case Rule::sgd: return launch<step_joint_kernel>("step", "step_joint_kernel", tiles, stream_, args_, table_);
    case Rule::adamw: return launch<step_joint_adamw_kernel>("step", "step_joint_adamw_kernel", tiles, stream_, args_, table_);
    case Rule::gradient: return launch<step_joint_gradient_kernel>("step", "step_joint_gradient_kernel", tiles, stream_, args_, table_);
  }
}

}  // namespace bip::cuda
