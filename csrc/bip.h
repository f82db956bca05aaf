// The contract between Python and the kernels: every operation, declared once.
//
// Nothing here knows torch. Callers pass raw pointers that live where the backend runs (host for bip::cpu, device for bip::cuda)
// and own all memory, workspaces included. The symbols are those of the paper: theta dense weights, s scores, m mask,
// z = m*theta (what the model's parameter holds), v momentum of theta, u momentum of s, g = dloss/dz; of AdamW a and b, the running means of
// m*g and of its square, and t, the number of steps.
#pragma once

#include <cstdint>

namespace bip {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

enum class Phase : int32_t {
  lower = 0,  // theta and v move on g, z follows; the mask stays
  upper = 1,  // u and s move on g, the mask is the top-k of s, z follows; theta stays
  joint = 2   // both from one g, every right-hand side at the old values
};

// What moves theta in lower and joint steps (update_rule.h); one for the whole optimizer.
enum class Rule : int32_t {
  none = 0,     // nothing: theta was moved by the caller, and a lower step is z = m*theta alone; in kernels also what an upper step has
  sgd = 1,      // theta and v
  adamw = 2,    // theta, a and b
  gradient = 3  // nothing yet: `momentum` takes m*g, and 0 where g is not finite, for an optimizer of the caller's
};

// Work is handed out in tiles of kTile consecutive entries of one tensor; a tensor's last tile may be short.
constexpr int64_t kTile = 1024;
// Flat arrays place every tensor at a multiple of kAlign entries, so its mask starts on a word and vector loads are aligned.
constexpr int64_t kAlign = 128;

// One parameter and its state. Entry i is the i-th element in the parameter's own memory order.
struct Tensor {
  void* param;            // z, [numel] of `dtype`
  float* theta;           // [numel]; for an f32 tensor that is not pruned it is `param` itself
  float* momentum;        // v, [numel]; of Rule::adamw a, of Rule::gradient m*g
  float* square;          // b, [numel]; null when the rule has none
  float* scores;          // s, [numel] in [0, 1]; null when not pruned
  float* score_momentum;  // u, [numel]; null when no mask momentum is used or not pruned
  uint32_t* mask;         // m, [ceil(numel/32)]: bit i%32 of word i/32; bits past numel are 0; null when not pruned
  int64_t* steps;         // t, one value: lower and joint steps with a gradient that were not skipped; null when the rule has none
  int64_t numel;
  int64_t first_tile;  // tiles are numbered over all tensors; this one owns [first_tile, first_tile + ceil(numel/kTile))
  int64_t index;       // of entry 0 inside its selection group, for the tie order; of N:M, inside its matrix
  int32_t group;       // row of `groups`; -1: not pruned, m is 1 everywhere
  int32_t hyper;       // row of `hypers`
  DType dtype;         // of `param`
  int32_t elsewhere;   // 1: another rank has the same entries and counts them; 0 on one device
  // Some columns of a matrix: entry i has index `index + i / row_length * row_stride + i % row_length`. 0: entry i has `index + i`.
  int64_t row_length, row_stride;
  // N:M: the `keep` largest of every `of` consecutive entries have m = 1. `of` is 2, 4, 8, 16 or 32 and divides `numel`; `group` is -1, and
  // entry i has the index in its matrix in the tie order. Both are 0 for every other pattern.
  int32_t keep, of;
};

// This step's gradient of one tensor, where autograd left it: [numel] of `dtype` in the parameter's memory order.
// No alignment beyond the dtype's own is promised. data == null: no gradient; the tensor's theta, v, u and s stay.
struct Gradient {
  const void* data;
  DType dtype;
  int32_t reserved;
};

struct Hyper {
  float lr;
  float mask_lr;
  float inv_gamma;  // 1/gamma
  float momentum;
  float mask_momentum;
  float weight_decay;
  int32_t nesterov;
  float eps;
  double beta1, beta2;
};

// A selection group: `kept` of its `numel` entries, those of all ranks, have m = 1. On one device `numel` is below 2^32. The caller may change
// `kept` in place between steps.
struct Group {
  int64_t numel;
  int64_t kept;
  int64_t entries;               // of `numel`, those that are here; below 2^32
  int64_t first;                 // entries, here, of the groups before this one
  int64_t tile_begin, tile_end;  // all its tiles are in [tile_begin, tile_end)
};

// Weights that are kept or dropped together are a unit: one score, one mask bit, one place in the selection. A set of `numel` units has a
// row of its own in the tensor table, without param, theta, momentum and gradient: the scores of that row are what the selection sees, its
// mask is the mask of the units. The weights have another row, with group -1 and without scores; each entry has the m of its unit.
struct UnitSet {
  float* scores;          // s, [numel]
  float* score_momentum;  // u, [numel]; null when no mask momentum is used
  uint32_t* before;       // [ceil(numel/32)] scratch: the mask before the step
  uint64_t* best;         // [ceil(numel/kTile)] scratch
  uint32_t* seen;         // one value, 0 between steps
  int64_t strips;         // of all its parts together
  float* sums;            // [strips][numel] scratch, zeroed once
  int32_t tensor;         // row of `tensors`; sets have consecutive rows
  int32_t hyper;          // row of `hypers`
  int32_t part_begin, part_end;
  int32_t min_kept;  // at least so many of its units are kept, whatever the scores of other sets; at most `numel`
  int32_t reserved;
};

// A tensor whose weights belong to the units of a set. Its entries in memory order are a matrix, `rows` x `cols`, and the units blocks of
// it, numbered row by row; those at the far edges may be smaller.
struct Part {
  int64_t rows, cols;
  int64_t block_rows, block_cols;
  int64_t first_item;  // work is handed out in items (unit_rule.h), numbered over all parts
  float* sums;         // [strips][numel of the set] of this part; null: its weights follow the units and add nothing to their scores
  int32_t tensor;      // row of `tensors`
  int32_t set;         // row of `unit_sets`
};

// How the selection of one group went, summed over its upper and joint steps. Reports show it; no step reads it.
struct Counters {
  int64_t steps;
  int64_t first;       // of these, steps that fell back because there was no window (on the CPU: and a sample gave none)
  int64_t missed;      //   because the k-th key was outside the window
  int64_t crowded;     //   because more keys were inside the window than the candidate list holds
  int64_t candidates;  // keys listed by the other steps
  int64_t flips;       // mask entries that changed; in a step that fell back also those that changed back
  float threshold;     // of the last step: no kept score is below it and no other score above it; may be infinite
  int32_t reserved;
};

struct Step {
  Phase phase;
  Rule rule;
  const Tensor* tensors;  // [num_tensors]
  int64_t num_tensors;
  const int32_t* tile_tensor;  // [num_tiles] the tensor a tile belongs to, ascending
  int64_t num_tiles;
  int64_t num_scored_tiles;  // tensors with scores come first and have these tiles
  const Group* groups;       // [num_groups]
  int64_t num_groups;
  const UnitSet* unit_sets;  // [num_unit_sets]
  int64_t num_unit_sets;
  int64_t unit_tile_begin, unit_tile_end;  // the tiles of all units
  const Part* parts;                       // [num_parts], those of a set together
  int64_t num_parts;
  int64_t num_items;          // of all parts
  const Hyper* hypers;        // one row per parameter group
  const Gradient* gradients;  // [num_tensors], always host memory, read before the call returns
  const float* grad_scale;    // one value: gradients are multiplied by 1 / *grad_scale, in fp32; null: 1
  const float* found_inf;     // one value: when not 0 the whole step does nothing; null: 0
  int64_t* num_nonfinite;     // one value: the entries skipped because g is not finite are added to it
  Counters* counters;         // [num_groups]
  void* workspace;            // step_workspace_bytes() bytes, zeroed once by the caller, and again after a step that threw; serves the next
};

// A mask of exactly k ones over one array of scores. Tie order: entry i has index i.
struct Topk {
  const float* scores;  // [n], any values; NaN is the smallest, -0 equals +0
  int64_t n;            // < 2^32
  int64_t k;            // 0 <= k <= n
  uint8_t* mask;        // [n], written as 0 or 1
  void* workspace;      // topk_workspace_bytes() bytes, contents free
};

// Phase::upper with no gradient at all is the plain projection: select the top-k of the scores as they are, then repair mask and z
// where entries flip. z is rewritten only where the mask flips (and, in lower and joint steps, where it is kept).
// The resulting mask is a function of s alone: no grid size, thread count, code path or history of the workspace changes it.

namespace cpu {
int64_t step_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles);
int64_t topk_workspace_bytes(int64_t n);
void step(const Step& args, int threads);
void topk(const Topk& args, int threads);

// An upper or joint step whose groups have entries on several ranks. The ranks count, and the caller adds up what they have counted:
//   shards_score; for (lifted < the largest min_kept) { shards_offer; the maximum of `keys` of all ranks, in place; shards_lift }
//   shards_begin; for (round = 0; ; ++round) { add `sums` of all ranks, in place; if (!shards_narrow(round)) break; } shards_end
// `sums`: [num_groups][shard_sums(num_groups)], `keys`: [num_unit_sets], written here. shards_narrow returns the same on every rank. The other
// arguments are those of the whole step in every call. Nothing but `sums` and `keys` is shared; see cpu/shards.cpp.
// On CUDA all of them are enqueued as `step` is, and shards_narrow returns whether another round may be needed at worst: nothing is read back.
// A rank that cannot make the step adds, in shard_rounds() rounds, rows that are 0 but for a 1 in their column kShardAbsent. The masks of all
// groups then stay as the pass has left them, on every rank, until the next upper or joint step.
constexpr int64_t kShardAbsent = 5;
int64_t shard_sums(int64_t num_groups);
constexpr int64_t shard_rounds(int64_t) { return 1; }  // after the first all groups are given up
int64_t shards_workspace_bytes(int64_t num_groups, int64_t num_scored_tiles);
void shards_score(const Step& args, int threads);
void shards_offer(const Step& args, int64_t* keys, int32_t lifted);
void shards_lift(const Step& args, const int64_t* keys);
void shards_begin(const Step& args, int64_t* sums, int threads);
bool shards_narrow(const Step& args, int64_t* sums, int threads);
void shards_end(const Step& args, int threads);

const char* simd();  // the instruction set chosen at run time
}  // namespace cpu

namespace cuda {
int64_t step_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles);
int64_t topk_workspace_bytes(int64_t n);
// Enqueue on `stream` (a cudaStream_t) of the current device; never synchronise, never allocate, capturable in a graph.
void step(const Step& args, void* stream);
void topk(const Topk& args, void* stream);

// As those of bip::cpu.
int64_t shard_sums(int64_t num_groups);
int64_t shard_rounds(int64_t num_groups);  // the pass, the digits of a key, and one of the index: all that any scores can need
int64_t shards_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles);
void shards_score(const Step& args, void* stream);
void shards_offer(const Step& args, int64_t* keys, int32_t lifted, void* stream);
void shards_lift(const Step& args, const int64_t* keys, void* stream);
void shards_begin(const Step& args, int64_t* sums, void* stream);
bool shards_narrow(const Step& args, int64_t* sums, int32_t round, void* stream);
void shards_end(const Step& args, void* stream);
}  // namespace cuda

}  // namespace bip
