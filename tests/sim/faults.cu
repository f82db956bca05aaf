// Kernels for the tests of the simulator itself: correct ones, and one for each kind of fault it promises to find.
#include <cstdio>

#include "launch.cuh"

namespace bip::cuda {
namespace {

// ---- correct ----

// Each block sums its 256 values: warp shuffles, then shared memory.
__global__ void sum_kernel(const int* data, int* sums) {
  __shared__ int warp_sums[kWarps];
  int sum = data[blockIdx.x * kThreads + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane_id() == 0) warp_sums[warp_id()] = sum;
  __syncthreads();
  int total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
  if (thread_id() == 0) sums[blockIdx.x] = total;
}

// Ballots and shuffles by the even lanes only, and a running count from the lanes below.
__global__ void collectives_kernel(int* data) {
  int value = static_cast<int>(__ballot_sync(kAllLanes, lane_id() % 3 == 0));
  if (lane_id() % 2 == 0) value ^= __shfl_sync(0x55555555u, lane_id(), 30);
  value += __shfl_up_sync(kAllLanes, lane_id(), 4);
  __syncwarp();
  data[threadIdx.x] = value;
}

// Writes the order in which blocks, and in each block warps, come to an atomic counter.
__global__ void order_kernel(int* order, int* counter) {
  if (lane_id() == 0) order[atomicAdd(counter, 1)] = static_cast<int>(blockIdx.x) * kWarps + warp_id();
}

// The last block to arrive sees what all others wrote.
__global__ void last_block_kernel(int* parts, unsigned* arrived, int* total) {
  __shared__ bool last;
  atomicAdd(&parts[blockIdx.x], 1);
  __syncthreads();
  if (thread_id() == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && thread_id() == 0)
    for (unsigned block = 0; block < gridDim.x; ++block) *total += parts[block];
}

// Every block sums what all blocks wrote before the barrier; twice, so that a barrier serves again.
__global__ void grid_sums_kernel(int* parts, int* sums) {
  for (int round = 1; round <= 2; ++round) {
    if (thread_id() == 0) parts[blockIdx.x] = round * static_cast<int>(blockIdx.x + 1);
    cooperative_groups::this_grid().sync();
    if (thread_id() == 1)
      for (unsigned block = 0; block < gridDim.x; ++block) sums[blockIdx.x] += parts[block];
    cooperative_groups::this_grid().sync();
  }
}

// ---- at fault ----

// The second block waits for a flag instead of the barrier and never comes.
__global__ void missing_block_kernel(int* data) {
  if (blockIdx.x == 1) return;
  cooperative_groups::this_grid().sync();
  data[threadIdx.x] = 1;
}

__global__ void missing_thread_kernel(int* data) {
  if (blockIdx.x == 1 && threadIdx.x == 40) return;
  cooperative_groups::this_grid().sync();
  data[threadIdx.x] = 1;
}

__global__ void divergent_grid_barrier_kernel(int* data) {
  if (blockIdx.x == 0)
    cooperative_groups::this_grid().sync();
  else
    cooperative_groups::this_grid().sync();
  data[threadIdx.x] = 1;
}

// Without the second barrier a fast block writes what a slow one has not read.
__global__ void missing_grid_barrier_kernel(int* parts, int* sums) {
  for (int round = 1; round <= 2; ++round) {
    if (thread_id() == 0) parts[blockIdx.x] = round * static_cast<int>(blockIdx.x + 1);
    cooperative_groups::this_grid().sync();
    if (thread_id() == 1)
      for (unsigned block = 0; block < gridDim.x; ++block) sums[blockIdx.x] += __ldcg(&parts[block]);
  }
}

// Arrives before its part is written: in no order of whole blocks does the last one miss a part.
__global__ void early_arrival_kernel(int* parts, unsigned* arrived, int* total) {
  __shared__ bool last;
  if (thread_id() == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  atomicAdd(&parts[blockIdx.x], 1);
  __syncthreads();
  if (last && thread_id() == 0)
    for (unsigned block = 0; block < gridDim.x; ++block) *total += parts[block];
}

__global__ void divergent_barrier_kernel(int* data) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void exit_before_barrier_kernel(int* data) {
  if (threadIdx.x == 77) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void shuffle_by_exited_lane_kernel(int* data) {
  if (threadIdx.x == 5) return;
  data[threadIdx.x] = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x), 0);
}

__global__ void mismatched_mask_kernel(int* data) {
  data[threadIdx.x] = static_cast<int>(__ballot_sync(lane_id() < 16 ? 0xffffu : kAllLanes, true));
}

__global__ void lane_outside_mask_kernel(int* data) {
  if (lane_id() < 16) data[threadIdx.x] = __shfl_sync(0xffffu, lane_id(), 20);
}

__global__ void barrier_in_half_a_warp_kernel(int* data) {
  if (lane_id() < 16) __syncthreads();
  data[threadIdx.x] = __shfl_sync(kAllLanes, lane_id(), 0);
}

__global__ void shared_index_kernel(int* data, int past) {
  __shared__ int room[kThreads];
  room[threadIdx.x + past] = 1;
  __syncthreads();
  data[threadIdx.x] = room[threadIdx.x];
}

__global__ void global_write_kernel(int* data, int n) {
  for (int i = thread_id(); i <= n; i += kThreads) data[i] = 1;
}

__global__ void global_read_kernel(const int* data, int n, int* sum) {
  if (thread_id() == 0)
    for (int i = 0; i <= n; ++i) *sum += data[i];
}

__global__ void null_kernel(int* data) {
  if (threadIdx.x == 200) data[0] = 1;
}

__global__ void misaligned_kernel(float* data) { __stwb(reinterpret_cast<uint4*>(data + 1), uint4{1, 2, 3, 4}); }

__global__ void uninitialized_kernel(int* data) {
  __shared__ int room[kThreads];
  if (threadIdx.x % 2) room[threadIdx.x] = 7;
  __syncthreads();
  data[threadIdx.x] = room[threadIdx.x];
}

// Without the barrier between write and read: right only if the left neighbour is in the same warp or went first.
__global__ void missing_barrier_kernel(int* data) {
  __shared__ int room[kThreads];
  room[threadIdx.x] = static_cast<int>(threadIdx.x);
  data[threadIdx.x] = room[(threadIdx.x + kThreads - 1) % kThreads];
}

__global__ void endless_barriers_kernel(int* data) {
  while (data[0] == 0) __syncthreads();
}

__global__ void deep_stack_kernel(int* data) {
  volatile char deep[1 << 20];
  for (int i = (1 << 20) - 1; i >= 0; i -= 1024) deep[i] = 1;
  data[threadIdx.x] = deep[0];
}

template <class... P, class... A>
void run(void (*kernel)(P...), int blocks, A... arguments) {
  launch_with(kernel, false, "fault", "kernel", blocks, nullptr, arguments...);
}
template <class... P, class... A>
void run_together(void (*kernel)(P...), int blocks, A... arguments) {
  launch_with(kernel, true, "fault", "kernel", blocks, nullptr, arguments...);
}

void run_by_name(const std::string& name, int* a, int* b, int* c, int n) {
  if (name == "sum") return run(sum_kernel, n, a, b);
  if (name == "collectives") return run(collectives_kernel, 1, a);
  if (name == "order") return run(order_kernel, n, a, b);
  if (name == "last_block") return run(last_block_kernel, n, a, reinterpret_cast<unsigned*>(b), c);
  if (name == "early_arrival") return run(early_arrival_kernel, n, a, reinterpret_cast<unsigned*>(b), c);
  if (name == "divergent_barrier") return run(divergent_barrier_kernel, 1, a);
  if (name == "exit_before_barrier") return run(exit_before_barrier_kernel, 1, a);
  if (name == "shuffle_by_exited_lane") return run(shuffle_by_exited_lane_kernel, 1, a);
  if (name == "mismatched_mask") return run(mismatched_mask_kernel, 1, a);
  if (name == "lane_outside_mask") return run(lane_outside_mask_kernel, 1, a);
  if (name == "barrier_in_half_a_warp") return run(barrier_in_half_a_warp_kernel, 1, a);
  if (name == "shared_index") return run(shared_index_kernel, 1, a, n);
  if (name == "global_write") return run(global_write_kernel, 1, a, n);
  if (name == "global_read") return run(global_read_kernel, 1, a, n, b);
  if (name == "null") return run(null_kernel, 1, static_cast<int*>(nullptr));
  if (name == "misaligned") return run(misaligned_kernel, 1, reinterpret_cast<float*>(a));
  if (name == "uninitialized") return run(uninitialized_kernel, 1, a);
  if (name == "missing_barrier") return run(missing_barrier_kernel, 1, a);
  if (name == "endless_barriers") return run(endless_barriers_kernel, 1, a);
  if (name == "deep_stack") return run(deep_stack_kernel, 1, a);
  if (name == "grid_sums") return run_together(grid_sums_kernel, n, a, b);
  if (name == "missing_block") return run_together(missing_block_kernel, 3, a);
  if (name == "missing_thread") return run_together(missing_thread_kernel, 3, a);
  if (name == "divergent_grid_barrier") return run_together(divergent_grid_barrier_kernel, 3, a);
  if (name == "missing_grid_barrier") return run_together(missing_grid_barrier_kernel, n, a, b);
  if (name == "not_together") return run(grid_sums_kernel, 2, a, b);
  if (name == "too_many_together") return run_together(grid_sums_kernel, 5, a, b);
  if (name == "empty_grid") return run(sum_kernel, 0, a, b);
  throw std::runtime_error("no kernel " + name);
}

}  // namespace
}  // namespace bip::cuda

// 0, or 1 with the error in `message`.
extern "C" __attribute__((visibility("default"))) int run_kernel(const char* name, int* a, int* b, int* c, int n, char* message,
                                                                 size_t size) {
  try {
    bip::cuda::run_by_name(name, a, b, c, n);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}
