// The mask of the k largest of n scores on the CPU: count the first digit, decide all outside the window, settle the candidates inside.
//
// Reads the scores twice (8 bytes per entry) and writes one byte per entry; every narrowing pass over a crowded window reads them once more.
#include <atomic>
#include <mutex>
#include <vector>

#include "bip.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "cpu/simd.h"

namespace bip::cpu {
namespace {

constexpr int kBlock = 32;
constexpr int64_t kGrain = 16 * 1024;  // scores per piece of parallel work

constexpr int64_t candidate_capacity(int64_t n) { return n / 32 + 1024; }

struct Context {
  const Topk& topk;
  Window window;
  uint64_t* candidates;  // [2 * candidate_capacity]: keys, then a copy to be reordered
  std::vector<uint32_t> counts = std::vector<uint32_t>(kBins);
  std::atomic<int64_t> found{0};
  std::mutex mutex{};
};

Histogram& cleared_histogram() {
  thread_local Histogram counts;
  counts.clear();
  return counts;
}

void hand_over(Context& context, const Histogram& histogram) {
  std::lock_guard<std::mutex> lock(context.mutex);
  histogram.add_to(context.counts.data());
}

BIP_HD void count_all_body(Context& context, int64_t begin, int64_t end) {
  Histogram& histogram = cleared_histogram();
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) count_first_digit(context.topk.scores + i, kBlock, histogram);
  count_first_digit(context.topk.scores + i, static_cast<int>(end - i), histogram);
  hand_over(context, histogram);
}

BIP_HD Verdict judge_at(const Context& context, int64_t i, int64_t end) {
  const float* scores = context.topk.scores + i;
  return end - i >= kBlock ? judge(scores, kBlock, context.window) : judge(scores, static_cast<int>(end - i), context.window);
}

BIP_HD uint64_t key_at(const Context& context, int64_t i) { return order_key(context.topk.scores[i], static_cast<uint32_t>(i)); }

BIP_HD void count_inside_body(Context& context, int64_t begin, int64_t end) {
  Histogram& histogram = cleared_histogram();
  const Window window = context.window;
  const int shift = narrower_shift(window);
  for (int64_t i = begin; i < end; i += kBlock) {
    for (uint32_t maybe = judge_at(context, i, end).maybe; maybe; maybe &= maybe - 1) {
      const uint64_t key = key_at(context, i + lowest_bit(maybe));
      if (key >= window.lo && key < window.hi) ++histogram.counts[i / kBlock % Histogram::kWays][(key - window.lo) >> shift];
    }
  }
  hand_over(context, histogram);
}

BIP_HD void decide_body(Context& context, int64_t begin, int64_t end) {
  const Window window = context.window;
  for (int64_t i = begin; i < end; i += kBlock) {
    const Verdict verdict = judge_at(context, i, end);
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - i));
    for (int j = 0; j < count; ++j) context.topk.mask[i + j] = (verdict.above >> j) & 1u;
    uint64_t found[kBlock];
    int num_found = 0;
    for (uint32_t maybe = verdict.maybe; maybe; maybe &= maybe - 1) {
      const int64_t entry = i + lowest_bit(maybe);
      const uint64_t key = key_at(context, entry);
      context.topk.mask[entry] = key >= window.hi;
      if (key >= window.lo && key < window.hi) found[num_found++] = key;
    }
    if (num_found) std::copy(found, found + num_found, context.candidates + context.found.fetch_add(num_found));
  }
}

BIP_SIMD_VARIANTS(count_all, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(count_inside, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(decide, (Context & context, int64_t begin, int64_t end), (context, begin, end))

void narrow_window(Context& context) {
  narrow(context.window, context.counts.data());
  std::fill(context.counts.begin(), context.counts.end(), 0u);
  if (context.window.settled()) close(context.window);
}

// The tie key is a bijection of the index, so a candidate's key alone says where it is.
void settle_candidates(Context& context) {
  const int64_t inside = context.window.inside;
  uint64_t* keys = context.candidates;
  uint64_t* scratch = keys + candidate_capacity(context.topk.n);
  std::copy(keys, keys + inside, scratch);
  const uint64_t threshold = settle(scratch, context.window);
  for (int64_t i = 0; i < inside; ++i)
    if (keys[i] >= threshold) context.topk.mask[index_of_tie_key(static_cast<uint32_t>(keys[i]))] = 1;
}

}  // namespace

int64_t topk_workspace_bytes(int64_t n) { return 2 * candidate_capacity(n) * static_cast<int64_t>(sizeof(uint64_t)); }

void topk(const Topk& args, int threads) {
  Context context{args, whole_window(args.n, args.k), static_cast<uint64_t*>(args.workspace)};
  if (context.window.settled()) {
    std::memset(args.mask, args.k > 0, static_cast<size_t>(args.n));
    return;
  }
  parallel_for(threads, args.n, kGrain, [&](int64_t begin, int64_t end) { count_all(context, begin, end); });
  narrow_window(context);
  while (context.window.inside > candidate_capacity(args.n)) {
    parallel_for(threads, args.n, kGrain, [&](int64_t begin, int64_t end) { count_inside(context, begin, end); });
    narrow_window(context);
  }
  parallel_for(threads, args.n, kGrain, [&](int64_t begin, int64_t end) { decide(context, begin, end); });
  if (context.window.inside > 0) settle_candidates(context);
}

}  // namespace bip::cpu
