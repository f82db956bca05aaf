// What neither this simulator nor ordinary tests on a GPU see, and the guard that covers each. Paths are below tests/.
//
//   a fence or a barrier too few between blocks   kernels/test_memory_model.py, in every order that CUDA allows; on a GPU large/stress.py,
//                                                 which must fail for a build with BIP_FAST_MUTATION=no-fences (setup.py)
//   a barrier over the grid                       seen here (kernels/test_simulator.py) but for its fences, which are the toolkit's.
//                                                 One made by hand: kernels/test_memory_model.py has two that are right
//   the finish of many tiles, also in graphs      large/large_lockstep.py on a GPU: from 600k weights on, missed and crowded windows, eager
//                                                 and in a GraphedIteration
//   more than 400 tensors, in two graphs          large/large_lockstep.py: 450 tensors, eager, and in two graphs that alternate
//   results that depend on a full grid            large/large_lockstep.py takes every step twice, large/stress.py ten times, from one state
//   first launch of a kernel inside a capture     engine/test_graphs_cuda.py after eager steps only. Not covered: a capture before any
//     (lazy loading)                              step of its phase
//   a table that changes inside a capture         an error: engine/test_plan_memory.py
//   a plan replaced while a stream still runs it  StepPlan.hold: engine/test_plan_memory.py, with torch.cuda._sleep on a GPU
//   a stream that reads what another still writes engine/test_concurrency.py, on a GPU
//   a second device                               engine/test_concurrency.py, where there are two GPUs
//   a toolkit newer than the driver               `bip-fast doctor` launches a kernel: commands/test_doctor.py
//   registers, shared memory, parameters          kernels/test_resources.py; launch.cuh checks the parameters when it is compiled
//   vector accesses that are not aligned          seen here (-fsanitize=alignment); static_asserts in block.cuh and histogram.cuh
//   speed, and the number of launches             the rows of bench/ count them and the steps without a usable window; no test asserts them
//   2^31 weights and more                         kernels/test_window.py pretends that tiles lie that far out, here; kernels/test_topk.py
//                                                 with BIP_FAST_LARGE_TESTS=1, real scores. Not covered: a whole step of so many
//
// The scheduler behind cuda_runtime.h: fibres for the threads of one block at a time. What it finds and what it cannot is said there.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "memory.h"
#include "sanitizers.h"

dim3 threadIdx, blockIdx, gridDim, blockDim;

// The shared variables of all kernels: the linker gives a section with a C name these ends. Weak: there may be none.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_bip_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_bip_shared[];

namespace sim {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kMaxTogether = 8192;  // threads of all blocks of a launch that may have barriers over its grid
constexpr size_t kStack = 128 * 1024, kStackGuard = 4096;
constexpr int kMaxBarriers = 200'000;  // in one block: more is taken for a loop without end

enum class State { ready, at_barrier, at_grid_barrier, at_collective, done };
const char* const kCollectiveNames[] = {"", "__syncwarp", "__ballot_sync", "__shfl_sync", "__shfl_up_sync", "__shfl_xor_sync"};

struct Thread {
  Context context;
  Known known;
  State state;
  const char* file;  // where it waits
  int line;
  Collective kind;
  unsigned mask;
  int argument;
  uint64_t value;  // in: the lane's own; out: the result
};

// Of a block: what its threads synchronise by. Only addresses, and new for each block.
struct Meetings {
  char all[8];
  char warps[kMaxThreads / kWarp][8];
};

struct Simulator {
  std::mutex mutex;           // one launch at a time
  std::vector<Thread> all;    // of all blocks that are resident
  Thread* threads = nullptr;  // of the block that runs
  char* stacks = nullptr;
  size_t num_stacks = 0;
  Context scheduler;
  Known host;
  Meetings* meetings = nullptr;                          // of the block that runs
  alignas(8) char fences[8], grid[8], begin[8], end[8];  // what threads of all blocks synchronise by
  unsigned num_threads = 0, current = 0;
  bool in_thread = false;  // a fibre runs: faults are its own
  bool together = false;   // blocks may wait for each other
  bool faulted = false;
  std::string message;
  std::string host_fault;  // one that the code around a launch made: the next launch reports it
  void (*run)(void*) = nullptr;
  void* context = nullptr;
  uint64_t seed = 0, random = 0;
  int max_grid = 4;
  int barriers = 0;  // passed by the block that runs
  int64_t launches = 0;
} s;

uint64_t next_random() {
  s.random ^= s.random << 13;
  s.random ^= s.random >> 7;
  s.random ^= s.random << 17;
  return s.random >> 11;
}

std::string thread_name(unsigned thread) { return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread); }

std::string place(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

// Records the first fault of a launch.
void record(const std::string& what) {
  if (!s.faulted) s.message = what;
  s.faulted = true;
}

[[noreturn]] void leave_for_good() {
  Thread& me = s.threads[s.current];
  me.state = State::done;
  release(s.end);
  fiber_stops(s.host, me.known, true);
  switch_context(me.context, s.scheduler);
  __builtin_unreachable();
}

// A fault in the running fibre, which never goes on.
[[noreturn]] void fault(const std::string& what) {
  record(thread_name(s.current) + ": " + what);
  leave_for_good();
}

void fault_anywhere(const std::string& what) {
  if (s.in_thread) fault(what);
  s.host_fault = "host code: " + what;
}

void thread_main() {
  fiber_runs(s.host, s.threads[s.current].known);
  acquire(s.begin);
  s.run(s.context);
  leave_for_good();
}

void resume(unsigned thread) {
  s.current = thread;
  threadIdx = dim3(thread, 0, 0);
  s.in_thread = true;
  before_fiber(s.host, s.threads[thread].known);
  switch_context(s.scheduler, s.threads[thread].context);
  after_fiber(s.host);
  s.in_thread = false;
}

void wait(State state, const char* file, int line) {
  Thread& me = s.threads[s.current];
  me.state = state;
  me.file = file;
  me.line = line;
  fiber_stops(s.host, me.known, false);
  switch_context(me.context, s.scheduler);
  fiber_runs(s.host, me.known);
}

// The same, at a place that orders what came before it, in any of the threads that meet there, before what comes after it.
void meet(State state, void* where, const char* file, int line) {
  release(where);
  wait(state, file, line);
  acquire(where);
}

// ---- collectives ----

std::string describe(unsigned thread) {
  const Thread& t = s.threads[thread];
  const std::string name = "thread " + std::to_string(thread);
  if (t.state == State::done) return name + " has exited";
  if (t.state == State::at_barrier) return name + " waits at __syncthreads (" + place(t.file, t.line) + ")";
  if (t.state == State::at_grid_barrier) return name + " waits at a barrier over the grid (" + place(t.file, t.line) + ")";
  char mask[16];
  std::snprintf(mask, sizeof mask, "%08x", t.mask);
  return name + " waits at " + kCollectiveNames[static_cast<int>(t.kind)] + " with mask " + mask + " (" + place(t.file, t.line) + ")";
}

// The first lane of `thread`'s collective that is not there with it; -1 if it is complete.
int missing_lane(unsigned thread) {
  const Thread& me = s.threads[thread];
  const unsigned first = thread / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(me.mask >> lane & 1u)) continue;
    if (first + lane >= s.num_threads) return static_cast<int>(thread);
    const Thread& other = s.threads[first + lane];
    if (other.state != State::at_collective || other.kind != me.kind || other.mask != me.mask || other.line != me.line ||
        std::strcmp(other.file, me.file) != 0)
      return static_cast<int>(first + lane);
  }
  return -1;
}

// The lane that a lane reads in a shuffle; past the ends it reads itself.
unsigned source_lane(const Thread& t, unsigned lane) {
  if (t.kind == Collective::shfl) return static_cast<unsigned>(t.argument) % kWarp;
  if (t.kind == Collective::shfl_xor) return (lane ^ static_cast<unsigned>(t.argument)) % kWarp;
  return lane >= static_cast<unsigned>(t.argument) ? lane - static_cast<unsigned>(t.argument) : lane;
}

// All lanes have arrived: hands out the results.
void complete(unsigned first, unsigned mask) {
  uint64_t values[kWarp] = {};
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    values[lane] = s.threads[first + lane].value;
    votes |= static_cast<unsigned>(values[lane] != 0) << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    Thread& t = s.threads[first + lane];
    t.state = State::ready;
    if (t.kind == Collective::ballot) t.value = votes;
    if (t.kind == Collective::ballot || t.kind == Collective::sync) continue;
    const unsigned source = source_lane(t, lane);
    if (!(mask >> source & 1u))
      record(thread_name(first + lane) + ": " + kCollectiveNames[static_cast<int>(t.kind)] + " reads lane " + std::to_string(source) +
             ", which is not in the mask (" + place(t.file, t.line) + ")");
    t.value = values[source];
  }
}

// ---- one block ----

// Runs the ready lanes of a warp, then completes its collectives. False: nothing to do.
bool run_warp(unsigned warp) {
  const unsigned first = warp * kWarp, lanes = std::min(kWarp, s.num_threads - first);
  const unsigned start = s.seed ? static_cast<unsigned>(next_random() % lanes) : 0;
  const bool backwards = s.seed && (next_random() & 1u);
  bool progress = false;
  for (unsigned i = 0; i < lanes && !s.faulted; ++i) {
    const unsigned lane = (start + (backwards ? lanes - i : i)) % lanes;
    if (s.threads[first + lane].state != State::ready) continue;
    resume(first + lane);
    progress = true;
  }
  for (unsigned lane = 0; lane < lanes && !s.faulted; ++lane) {
    if (s.threads[first + lane].state != State::at_collective || missing_lane(first + lane) >= 0) continue;
    complete(first, s.threads[first + lane].mask);
    progress = true;
  }
  return progress;
}

// What becomes of a block in which nobody can run: it goes on after its barrier, waits for the other blocks, or has ended, if not faulted.
enum class Block { running, waiting, ended };

Block release_barrier() {
  int waiting = -1, done = -1, elsewhere = -1;
  for (unsigned i = 0; i < s.num_threads; ++i) {
    const Thread& t = s.threads[i];
    if (t.state == State::at_collective)
      return record(thread_name(i) + ": a collective is not reached by all lanes of its mask: " + describe(i) + ", but " +
                    describe(static_cast<unsigned>(missing_lane(i)))),
             Block::ended;
    if (t.state == State::done) done = static_cast<int>(i);
    if (t.state != State::at_barrier && t.state != State::at_grid_barrier) continue;
    if (waiting < 0) waiting = static_cast<int>(i);
    const Thread& other = s.threads[static_cast<unsigned>(waiting)];
    if (t.line != other.line || std::strcmp(t.file, other.file) != 0) elsewhere = static_cast<int>(i);
  }
  if (waiting < 0) return Block::ended;
  const int culprit = elsewhere >= 0 ? elsewhere : done;
  if (culprit >= 0)
    return record(thread_name(static_cast<unsigned>(waiting)) + ": divergent barrier: " + describe(static_cast<unsigned>(waiting)) +
                  ", but " + describe(static_cast<unsigned>(culprit))),
           Block::ended;
  if (++s.barriers > kMaxBarriers)
    return record(thread_name(0) + ": no end in sight: " + describe(0) + " for the " + std::to_string(s.barriers) + "th time"),
           Block::ended;
  if (s.threads[0].state == State::at_grid_barrier) return Block::waiting;
  for (unsigned i = 0; i < s.num_threads; ++i) s.threads[i].state = State::ready;
  return Block::running;
}

// ---- all blocks ----

// A block that is resident: its shared memory and barriers while another one runs.
struct Resident {
  unsigned block = 0;
  Block state = Block::ended;
  int barriers = 0;
  std::vector<char> shared;
  std::unique_ptr<Meetings> meetings;
};

size_t shared_size() { return __start_bip_shared ? static_cast<size_t>(__stop_bip_shared - __start_bip_shared) : 0; }

void copy_shared(char* to, const char* from) {
  if (!shared_size()) return;
  const Unseen unseen;
  std::memcpy(to, from, shared_size());
  forget(__start_bip_shared, shared_size());
}

void begin_block(Resident& resident, size_t place, unsigned block) {
  resident = {block, Block::running, 0, std::vector<char>(shared_size(), static_cast<char>(0xA5)), std::make_unique<Meetings>()};
  for (size_t i = place * s.num_threads; i < (place + 1) * s.num_threads; ++i) {
    s.all[i].state = State::ready;
    know(s.all[i].known, s.stacks + i * kStack + kStackGuard, kStack - kStackGuard);
    make_context(s.all[i].context, s.stacks + i * kStack + kStackGuard, kStack - kStackGuard, thread_main);
  }
}

// Runs some warps of the block, or lets it pass its barrier.
Block advance_block() {
  const unsigned warps = (s.num_threads + kWarp - 1) / kWarp;
  const unsigned start = s.seed ? static_cast<unsigned>(next_random() % warps) : 0;
  const bool backwards = s.seed && (next_random() & 1u);
  bool progress = false;
  for (unsigned i = 0; i < warps && !s.faulted; ++i) {
    const unsigned warp = (start + (backwards ? warps - i : i)) % warps;
    // With a seed a warp may run far ahead of the others.
    const unsigned turns = s.seed ? 1 + static_cast<unsigned>(next_random() % 4) : 1;
    for (unsigned turn = 0; turn < turns && !s.faulted && run_warp(warp); ++turn) progress = true;
    if (progress && s.seed && next_random() % 4 == 0) return Block::running;
  }
  return s.faulted ? Block::ended : progress ? Block::running : release_barrier();
}

// The block at `place` runs for a while: with a seed until another one's turn comes, otherwise until it has ended or waits for others.
void run_resident(Resident& resident, size_t place) {
  blockIdx = dim3(resident.block, 0, 0);
  s.threads = s.all.data() + place * s.num_threads;
  s.barriers = resident.barriers;
  s.meetings = resident.meetings.get();
  copy_shared(__start_bip_shared, resident.shared.data());
  for (uint64_t turns = s.seed ? 1 + next_random() % (next_random() % 8 ? 4 : 64) : ~0ull; turns && resident.state == Block::running;
       --turns)
    resident.state = advance_block();
  copy_shared(resident.shared.data(), __start_bip_shared);
  resident.barriers = s.barriers;
}

// No block can run: those that wait go on, or it is a fault that others will never come.
void release_grid_barrier(std::vector<Resident>& residents) {
  const Resident *waiting = nullptr, *ended = nullptr;
  const auto threads_of = [&](const Resident& resident) { return s.all.data() + (&resident - residents.data()) * s.num_threads; };
  const auto where = [&](const Resident& resident) {
    return "block " + std::to_string(resident.block) + " waits at a barrier over the grid (" +
           place(threads_of(resident)->file, threads_of(resident)->line) + ")";
  };
  for (Resident& resident : residents) (resident.state == Block::waiting ? waiting : ended) = &resident;
  if (!waiting) return;
  if (ended) return record(where(*waiting) + ", but block " + std::to_string(ended->block) + " has ended");
  for (Resident& resident : residents) {
    if (where(resident).substr(where(resident).find(" waits")) != where(*waiting).substr(where(*waiting).find(" waits")))
      return record("divergent barrier over the grid: " + where(*waiting) + ", but " + where(resident));
  }
  for (Resident& resident : residents) {
    resident.state = Block::running;
    for (unsigned i = 0; i < s.num_threads; ++i) threads_of(resident)[i].state = State::ready;
  }
}

// With a seed several blocks are resident and take turns; otherwise one after the other. All are resident where they may wait for each
// other.
void run_blocks(const std::vector<unsigned>& order) {
  const size_t most = s.seed ? std::min<size_t>(kMaxThreads / s.num_threads, order.size()) : 1;
  std::vector<Resident> residents(s.together ? order.size() : most);
  size_t begun = 0;
  for (; begun < residents.size(); ++begun) begin_block(residents[begun], begun, order[begun]);
  const auto runs = [](const Resident& resident) { return resident.state == Block::running; };
  while (!s.faulted) {
    if (std::none_of(residents.begin(), residents.end(), runs)) release_grid_barrier(residents);
    if (s.faulted || std::none_of(residents.begin(), residents.end(), runs)) return;
    size_t place = s.seed ? next_random() % residents.size() : 0;
    while (!runs(residents[place])) place = (place + 1) % residents.size();
    run_resident(residents[place], place);
    if (residents[place].state == Block::ended && begun < order.size()) begin_block(residents[place], place, order[begun++]);
  }
}

}  // namespace

void barrier(const char* file, int line) { meet(State::at_barrier, s.meetings->all, file, line); }

void grid_barrier(const char* file, int line) {
  if (!s.together) fault("a barrier over the grid in a launch whose blocks need not be resident (" + place(file, line) + ")");
  meet(State::at_grid_barrier, s.grid, file, line);
}

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument, const char* file, int line) {
  Thread& me = s.threads[s.current];
  if (!(mask >> (s.current % kWarp) & 1u))
    fault(std::string(kCollectiveNames[static_cast<int>(kind)]) + " by a lane that is not in its mask (" + place(file, line) + ")");
  me.kind = kind;
  me.mask = mask;
  me.value = value;
  me.argument = argument;
  if (kind == Collective::sync)
    meet(State::at_collective, s.meetings->warps[s.current / kWarp], file, line);
  else
    wait(State::at_collective, file, line);
  return me.value;
}

void maybe_yield() {
  if (s.seed && next_random() % 16 == 0) wait(State::ready, "", 0);
}

void fence() {
  maybe_yield();
  acquire(s.fences);
  release(s.fences);
}

cudaError_t run_grid(dim3 grid, dim3 block, bool together, void (*thread)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.faulted = true;
  s.message = "invalid configuration: " + std::to_string(grid.x) + " blocks of " + std::to_string(block.x) + " threads";
  if (grid.x == 0 || block.x == 0 || block.x > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (!s.host_fault.empty()) {
    s.message = std::exchange(s.host_fault, {});
    return cudaErrorLaunchFailure;
  }
  const size_t num_stacks = together ? static_cast<size_t>(grid.x) * block.x : kMaxThreads;
  if (together && (grid.x > static_cast<unsigned>(s.max_grid) || num_stacks > kMaxTogether)) {
    s.message = "too many blocks in cooperative launch: " + std::to_string(grid.x);
    return cudaErrorCooperativeLaunchTooLarge;
  }
  s.faulted = false;
  ++s.launches;
  s.together = together;
  if (s.num_stacks < num_stacks) {
    if (s.stacks) free_stacks(s.stacks, s.num_stacks, kStack);
    s.num_stacks = std::max<size_t>(num_stacks, kMaxThreads);
    s.stacks = allocate_stacks(s.num_stacks, kStack, kStackGuard);
    s.all.resize(s.num_stacks);
  }
  s.num_threads = block.x;
  s.run = thread;
  s.context = context;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
  for (unsigned i = grid.x; s.seed && i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  const CatchFaults guard([](const char* what) {
    if (s.in_thread) fault(what);
  });
  know_host(s.host);
  release(s.begin);
  run_blocks(order);
  acquire(s.end);
  return s.faulted ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace sim

// ---- the runtime ----

cudaError_t cudaGetDevice(int* device) {
  *device = 1 << 20;  // beyond any cache: set_max_grid may change the answers below
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = sim::s.max_grid;  // one block per processor
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : sim::s.message.c_str(); }

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

// ---- what the compiler calls where -fsanitize=bounds,alignment finds something ----

namespace {
struct Source {
  const char* file;
  uint32_t line, column;
};
}  // namespace

#define BIP_SIM_EXPORT extern "C" __attribute__((visibility("default")))
extern "C" void __ubsan_handle_out_of_bounds(const Source* source, uintptr_t index) {
  sim::fault_anywhere("index " + std::to_string(static_cast<intptr_t>(index)) + " is out of bounds (" +
                      sim::place(source->file, static_cast<int>(source->line)) + ")");
}
extern "C" void __ubsan_handle_type_mismatch_v1(const Source* source, uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "%#zx", static_cast<size_t>(address));
  sim::fault_anywhere(std::string("misaligned access at address ") + text + " (" +
                      sim::place(source->file, static_cast<int>(source->line)) + ")");
}

// ---- what Python calls, see build.py ----

BIP_SIM_EXPORT void bip_sim_set_seed(uint64_t seed) {
  sim::s.seed = seed;
  sim::s.random = seed * 0x9E3779B97F4A7C15ull | 1u;
}
BIP_SIM_EXPORT void bip_sim_set_max_grid(int blocks) { sim::s.max_grid = blocks; }
BIP_SIM_EXPORT int64_t bip_sim_launches(int reset) {
  const int64_t launches = sim::s.launches;
  if (reset) sim::s.launches = 0;
  return launches;
}
BIP_SIM_EXPORT void* bip_sim_guarded(size_t bytes, size_t align) { return sim::Guarded(bytes, align).allocate(); }
BIP_SIM_EXPORT void bip_sim_free_guarded(void* pointer, size_t bytes, size_t align) { sim::Guarded(bytes, align).free(pointer); }
