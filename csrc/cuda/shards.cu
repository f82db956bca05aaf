// Upper and joint steps whose selection groups have entries on several ranks: what cpu/shards.cpp does, enqueued.
//
//   score   1 launch with units      sums and scores of the units
//   offer   1                        the best unit of every set that is not lifted yet
//   lift    1                        the one that is best of all ranks is kept in any case
//   begin   3 and a memset           opens the search, moves and judges all entries (pass.cu), counts the candidates
//   narrow  2                        reads the sums of all ranks (search.h), and counts the next digit
//   end     1, with units 2          every entry that is open gets its bit, and the window of the next step is set
//
// `score` has a barrier over its grid, so all its blocks must become resident: collectives of other groups of ranks, such as those of
// gradients, should be done by then, or on the same stream.
// The host decides nothing, so the caller adds up sums for as many rounds as a key can need. Rounds with nothing to do return at once: after a
// window that was right, those behind the second or third.
#include "launch.cuh"
#include "shard_count.cuh"
#include "units.cuh"

namespace bip::cuda {
namespace {

constexpr uint64_t kSign = 1ull << 63;  // keys without it are compared as signed numbers

// --- units ---------------------------------------------------------------------------------------------------------------------------

// One warp per set.
__global__ void __launch_bounds__(kThreads) shards_offer_kernel(const Args __grid_constant__ args, int64_t* keys, int32_t lifted) {
  const Step& step = args.step;
  if (skipped(step)) return;
  for (int number = global_warp(); number < step.num_unit_sets; number += num_warps()) {
    const UnitSet& set = step.unit_sets[number];
    const int64_t tiles = lifted < set.min_kept ? ceil_div(step.tensors[set.tensor].numel, kTile) : 0;
    uint64_t best = 0;
    for (int64_t tile = lane_id(); tile < tiles; tile += kWarp) best = set.best[tile] > best ? set.best[tile] : best;
    best = max_of_warp(best);
    if (lane_id() == 0) keys[number] = static_cast<int64_t>(best ^ kSign);
  }
}

// One warp per set: the unit that has this key, if it is here.
__global__ void __launch_bounds__(kThreads) shards_lift_kernel(const Args __grid_constant__ args, const int64_t* keys) {
  const Step& step = args.step;
  if (skipped(step)) return;
  for (int number = global_warp(); number < step.num_unit_sets; number += num_warps()) {
    const UnitSet& set = step.unit_sets[number];
    const Tensor& units = step.tensors[set.tensor];
    const uint64_t key = static_cast<uint64_t>(keys[number]) ^ kSign;
    if (key == 0) continue;
    const int64_t tiles = ceil_div(units.numel, kTile);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (set.best[tile] != key) continue;  // the same for all lanes
      uint64_t next = 0;
      for (int64_t unit = tile * kTile + lane_id(); unit < smaller(units.numel, (tile + 1) * kTile); unit += kWarp) {
        const uint64_t own = key_of(units, unit, units.scores[unit]);
        if (own == key)
          units.scores[unit] = kNeeded;
        else
          next = own > next ? own : next;
      }
      next = max_of_warp(next);
      if (lane_id() == 0) set.best[tile] = next;
      break;
    }
    __syncwarp();
  }
}

// --- the search --------------------------------------------------------------------------------------------------------------------------

// One thread per group.
__global__ void __launch_bounds__(kThreads) shards_open_kernel(const Args __grid_constant__ args, int64_t* sums) {
  if (skipped(args.step)) return;
  const int threads = static_cast<int>(gridDim.x) * kThreads;
  for (int group = static_cast<int>(blockIdx.x) * kThreads + thread_id(); group < args.step.num_groups; group += threads) {
    GroupState& state = state_of(args, group);
    args.workspace.searches[group] = opened(state.memory, args.step.groups[group]);
    report_in(row_of(args, sums, group).pass, state.memory);
    state.progress = {};
    ++args.step.counters[group].steps;
  }
}

// The next digit of every open group: of its candidates where these are all that is open, else of all its scores.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    shards_count_kernel(const Args __grid_constant__ args, int64_t* sums, bool pass) {
  __shared__ CountRoom room;
  if (skipped(args.step)) return;
  for_shares(args, [&](int group, int part, const Range& share) {
    const Search& search = args.workspace.searches[group];
    if (search.settled || !(pass || search.listed)) return;
    if (pass && part == 0 && thread_id() == 0) add(row_of(args, sums, group).pass.above, state_of(args, group).progress.above);
    if (pass) {
      const uint32_t collected = state_of(args, group).progress.collected;
      if (!shared_guess_of(args, group).known || collected > capacity_of(args, group)) {
        if (part == 0 && thread_id() == 0) {
          add(row_of(args, sums, group).pass.crowded, 1);
          add(row_of(args, sums, group).pass.inside, collected);
        }
        return;
      }
    }
    if (share.begin == share.end) return;
    begin_counting(room, search, digit_bits(args));
    count_listed(args, room, group, share, pass);
    end_counting(room, row_of(args, sums, group));
  });
  if (pass) return;
  for_runs(args, [&](const Run& run) {
    const Search& search = args.workspace.searches[run.group];
    if (!search.counting()) return;
    begin_counting(room, search, digit_bits(args));
    for_tiles_in(args, run, [&](const Tile& tile) {
      if (!tile.tensor.elsewhere) count_tile(room, tile);
    });
    end_counting(room, row_of(args, sums, run.group));
  });
}

struct ReadRoom {
  int64_t above[kBins];  // keys in higher bins
  int64_t total;
  int64_t shares[kThreads];
};

struct SummedBins {
  static constexpr bool kCountsCrowded = false;  // what other ranks count is not left out, and without a window nothing is judged
  const ReadRoom& room;
  int digit_bits;

  // The lowest bin with fewer than `rank` keys above it.
  __device__ __forceinline__ RankedBin of_rank(int64_t rank) const {
    int low = 0, high = (1 << digit_bits) - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (room.above[middle] < rank)
        high = middle;
      else
        low = middle + 1;
    }
    return {low, room.above[low], (low == 0 ? room.total : room.above[low - 1]) - room.above[low]};
  }
};

static_assert(1 << kShortDigitBits == kThreads && kDigitBits >= kShortDigitBits, "a thread adds up one bin or more");

// Whole block: adds up the counts from the highest bin down.
__device__ __forceinline__ void add_up(ReadRoom& room, const int64_t* counts, int bins) {
  const int each = bins / kThreads, highest = bins - 1 - thread_id() * each;
  int64_t own[kBinsPerThread], sum = 0;
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) sum += own[j] = j < each ? counts[highest - j] : 0;
  room.shares[thread_id()] = sum;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const int64_t before = thread_id() >= distance ? room.shares[thread_id() - distance] : 0;
    __syncthreads();
    room.shares[thread_id()] += before;
    __syncthreads();
  }
  int64_t above = room.shares[thread_id()] - sum;
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) {
    if (j < each) room.above[highest - j] = above;
    above += own[j];
  }
  if (thread_id() == kThreads - 1) room.total = above;
  __syncthreads();
}

// One block per group: reads the sums over all ranks, and leaves zeros for the next.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) shards_read_kernel(const Args __grid_constant__ args, int64_t* sums) {
  __shared__ ReadRoom room;
  if (skipped(args.step)) return;
  for (int group = static_cast<int>(blockIdx.x); group < args.step.num_groups; group += static_cast<int>(gridDim.x)) {
    Search& search = args.workspace.searches[group];
    const bool settled = search.settled;
    __syncthreads();  // all threads have read it
    if (settled) continue;
    const ShardSums own_sums = row_of(args, sums, group);
    const int bits = digit_bits(args);
    add_up(room, own_sums.counts, 1 << bits);
    if (thread_id() == 0) {
      Search own = search;
      read_sums(own, state_of(args, group).memory, args.step.counters[group], args.step.groups[group], own_sums.pass,
                SummedBins{room, bits});
      search = own;
      own_sums.pass = {};
    }
    for (int bin = thread_id(); bin < 1 << bits; bin += kThreads) own_sums.counts[bin] = 0;
    __syncthreads();
  }
}

// --- the end -------------------------------------------------------------------------------------------------------------------------

// One warp gives all entries of a tile their bit. Returns how many have flipped in this lane.
__device__ __forceinline__ uint32_t settle_tile(const Tile& tile, const Threshold& threshold) {
  uint32_t flips = 0;
  for (int base = 0; base < tile.entries; base += kStride) {
    const int place = base + lane_id() * kQuad;
    const uint32_t old_word = tile.word<false>(place);
    const Quad<float> s = load_quad<false>(tile.tensor.scores + tile.first + place, tile.entries - place);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (place + j >= tile.entries) continue;
      const int64_t index = bip::index_of(tile.tensor, tile.first + place + j);
      bits |= threshold.keeps(full_key(score_key(s.x[j]), static_cast<uint32_t>(index)), index) ? 1u << j : 0u;
    }
    flips += static_cast<uint32_t>(__popc(bits ^ (old_word >> bit_of_lane() & 0xfu)));
    const uint32_t word = word_of_bits(bits);
    __syncwarp();  // the other lanes have read the word
    if (lane_id() % 8 == 0 && word != old_word) tile.tensor.mask[tile.word_number(place)] = word;
    flip_quad(tile, place, word, old_word);
  }
  return flips;
}

// Candidates get their bit, and where these are not all that was open, all entries of the group do.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) shards_end_kernel(const Args __grid_constant__ args) {
  if (skipped(args.step)) return;
  for_shares(args, [&](int group, int part, const Range& share) {
    const Search& search = args.workspace.searches[group];
    const Threshold threshold = search.threshold();
    if (part == 0 && thread_id() == 0) remember(search, state_of(args, group).memory, args.step.counters[group]);
    if (!search.listed || search.given_up) return;
    const Candidate* list = candidates_of(args, group);
    for (int i = share.begin + thread_id(); i < share.end; i += kThreads) {
      const Candidate candidate = list[i];
      const int64_t index = candidate.key == threshold.key ? index_of(tensor_of(args, candidate), candidate) : 0;
      repair(args, group, candidate, threshold.keeps(candidate.key, index));
    }
  });
  for_runs(args, [&](const Run& run) {
    const Search& search = args.workspace.searches[run.group];
    if (search.listed) return;
    const Threshold threshold = search.threshold();
    uint32_t flips = 0;
    for_tiles_in(args, run, [&](const Tile& tile) { flips += settle_tile(tile, threshold); });
    flips = sum_of_warp(flips);
    if (lane_id() == 0 && flips) add(args.step.counters[run.group].flips, flips);
  });
}

// --- launches ------------------------------------------------------------------------------------------------------------------------

// What the workspace has behind that of a step on one device.
Search* searches_of(const Step& step) {
  return reinterpret_cast<Search*>(static_cast<char*>(step.workspace) +
                                   step_workspace_bytes(step.num_tensors, step.num_groups, step.num_scored_tiles));
}

Pass pass_of(const Step& step, void* stream) { return Pass(step, searches_of(step), stream); }

// As many blocks as count the scores of all tiles, for where a window was wrong.
void launch_count(const Pass& pass, int64_t* sums, bool in_pass, void* stream) {
  launch<shards_count_kernel>("shards", "shards_count_kernel", pass.args().step.num_scored_tiles, stream, pass.args(), sums, in_pass);
}

}  // namespace

int64_t shard_sums(int64_t num_groups) { return kFirstCount + (1ll << digit_bits_of(num_groups, kDigitBits)); }

int64_t shard_rounds(int64_t num_groups) {
  const int bits = digit_bits_of(num_groups, kDigitBits);
  return 1 + (64 + bits - 1) / bits + 1;
}

int64_t shards_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles) {
  return step_workspace_bytes(num_tensors, num_groups, num_scored_tiles) + num_groups * static_cast<int64_t>(sizeof(Search));
}

void shards_score(const Step& args, void* stream) {
  const Pass pass = pass_of(args, stream);
  pass.launch_gradients();
  pass.launch_scores();
}

void shards_offer(const Step& args, int64_t* keys, int32_t lifted, void* stream) {
  const int64_t blocks = args.num_unit_sets;
  if (blocks) launch<shards_offer_kernel>("shards", "shards_offer_kernel", blocks, stream, pass_of(args, stream).args(), keys, lifted);
}

void shards_lift(const Step& args, const int64_t* keys, void* stream) {
  const int64_t blocks = args.num_unit_sets;
  if (blocks) launch<shards_lift_kernel>("shards", "shards_lift_kernel", blocks, stream, pass_of(args, stream).args(), keys);
}

void shards_begin(const Step& args, int64_t* sums, void* stream) {
  const Pass pass = pass_of(args, stream);
  const size_t bytes = static_cast<size_t>(args.num_groups * shard_sums(args.num_groups)) * sizeof(int64_t);
  if (bytes) {
    check(cudaMemsetAsync(sums, 0, bytes, stream_of(stream)), "shards", "cudaMemsetAsync");
    launch<shards_open_kernel>("shards", "shards_open_kernel", (args.num_groups + kWarp - 1) / kWarp, stream, pass.args(), sums);
  }
  if (args.num_tiles) pass.launch_update();
  if (bytes) launch_count(pass, sums, true, stream);
}

bool shards_narrow(const Step& args, int64_t* sums, int32_t round, void* stream) {
  if (args.num_groups == 0) return false;
  const Pass pass = pass_of(args, stream);
  launch<shards_read_kernel>("shards", "shards_read_kernel", args.num_groups * kWarps, stream, pass.args(), sums);
  const bool more = round + 1 < shard_rounds(args.num_groups);
  if (more) launch_count(pass, sums, false, stream);
  return more;
}

void shards_end(const Step& args, void* stream) {
  const Pass pass = pass_of(args, stream);
  if (args.num_groups) launch<shards_end_kernel>("shards", "shards_end_kernel", args.num_scored_tiles, stream, pass.args());
  pass.launch_spread();
}

}  // namespace bip::cuda
