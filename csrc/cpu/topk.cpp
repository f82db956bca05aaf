// The mask of the k largest of n scores on the CPU, in one pass as a rule (select.h): guess a window from a sample, judge every score
// against it, settle the candidates inside.
//
// Reads a score and writes a mask byte, 5 bytes per entry. A wrong guess costs a second pass, and counting passes of 4 bytes per entry
// while too many are inside. Deterministic: every entry ends up judged by its own key against one threshold.
#include <atomic>
#include <mutex>
#include <vector>

#include "bip.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "cpu/simd.h"

namespace bip::cpu {
namespace {

constexpr int64_t kGrain = 16 * 1024;        // scores per piece of parallel work
constexpr int64_t kCountGrain = 128 * 1024;  // the same where a piece ends with adding up all bins

struct Context {
  const Topk& topk;
  uint64_t* keys;  // [capacity] the sample, then the candidates
  int64_t capacity;
  Window window;
  std::vector<uint32_t> counts;  // [kBins] of one digit, zero between passes; guarded by `mutex`
  std::mutex mutex{};
  alignas(64) std::atomic<int64_t> found{0};  // keys listed, and those without room in the list; apart from what every thread reads
  std::atomic<int64_t> above{0};

  // Lists the candidates of one piece of work.
  void list(const uint64_t* more, int64_t count) {
    const int64_t at = found.fetch_add(count, std::memory_order_relaxed);
    if (at + count <= capacity) std::copy(more, more + count, keys + at);
  }
};

// One piece of the array. It holds copies: behind a reference, the compiler would have to assume that every mask byte written changes them.
struct Piece {
  const float* scores;
  uint8_t* mask;
  int64_t end;
  Window window;

  Piece(const Context& context, int64_t piece_end)
      : scores(context.topk.scores), mask(context.topk.mask), end(piece_end), window(context.window) {}

  BIP_HD int size_at(int64_t i) const { return static_cast<int>(std::min<int64_t>(kBlock, end - i)); }
  BIP_HD uint64_t key(int64_t i) const { return order_key(scores[i], static_cast<uint32_t>(i)); }
  BIP_HD Verdict verdict(int64_t i, int count) const { return judge(scores + i, count, static_cast<uint32_t>(i), window); }
};

void sample(Context& context, int64_t begin, int64_t end) {
  const Piece piece(context, end);
  for_sampled_blocks(begin / kBlock, (end + kBlock - 1) / kBlock, sample_stride(context.topk.n), [&](int64_t block) {
    uint64_t keys[kBlock];
    const int count = piece.size_at(block * kBlock);
    for (int i = 0; i < count; ++i) keys[i] = piece.key(block * kBlock + i);
    context.list(keys, count);
  });
}

BIP_HD Verdict judge_block(const Piece& piece, int64_t begin, int count) {
  const Verdict verdict = piece.verdict(begin, count);
  for (int i = 0; i < count; ++i) piece.mask[begin + i] = (verdict.above & kBit[i]) != 0;
  return verdict;
}

BIP_HD void judge_all_body(Context& context, int64_t begin, int64_t end) {
  constexpr int kRoom = 1024;
  uint64_t found[kRoom];
  int num_found = 0;
  int64_t above = 0;
  const Piece piece(context, end);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = piece.size_at(i);
    const Verdict verdict = count == kBlock ? judge_block(piece, i, kBlock) : judge_block(piece, i, count);
    above += count_bits(verdict.above);
    for (uint32_t inside = verdict.inside; inside; inside &= inside - 1) found[num_found++] = piece.key(i + lowest_bit(inside));
    if (num_found > kRoom - kBlock) {
      context.list(found, num_found);
      num_found = 0;
    }
  }
  context.list(found, num_found);
  context.above.fetch_add(above, std::memory_order_relaxed);
}

BIP_HD void count_inside_body(Context& context, int64_t begin, int64_t end) {
  uint32_t counts[kBins] = {};
  const Piece piece(context, end);
  const int shift = digit_shift(piece.window);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = piece.size_at(i);
    const Verdict verdict = count == kBlock ? piece.verdict(i, kBlock) : piece.verdict(i, count);
    for (uint32_t inside = verdict.inside; inside; inside &= inside - 1)
      ++counts[(piece.key(i + lowest_bit(inside)) - piece.window.lo) >> shift];
  }
  std::lock_guard<std::mutex> lock(context.mutex);
  for (int bin = 0; bin < kBins; ++bin) context.counts[static_cast<size_t>(bin)] += counts[bin];
}

BIP_SIMD_VARIANTS(judge_all, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(count_inside, (Context & context, int64_t begin, int64_t end), (context, begin, end))

void judge_all(Context& context, int threads) {
  context.found = context.above = 0;
  parallel_for(threads, context.topk.n, kGrain, [&](int64_t begin, int64_t end) { judge_all(context, begin, end); });
}

// Narrows the window until the list has room for all keys inside, and judges again.
void fall_back(Context& context, int threads) {
  const int64_t n = context.topk.n;
  while (context.window.inside > context.capacity) {
    parallel_for(threads, n, kCountGrain, [&](int64_t begin, int64_t end) { count_inside(context, begin, end); });
    narrow(context.window, Bins<uint32_t>{context.counts.data()});
    std::fill(context.counts.begin(), context.counts.end(), 0u);
  }
  judge_all(context, threads);
}

}  // namespace

int64_t topk_workspace_bytes(int64_t n) { return list_capacity(n) * static_cast<int64_t>(sizeof(uint64_t)); }

void topk(const Topk& args, int threads) {
  const int64_t n = args.n, k = args.k;
  if (k == 0 || k == n) {
    std::fill_n(args.mask, n, static_cast<uint8_t>(k > 0));
    return;
  }
  Context context{args, static_cast<uint64_t*>(args.workspace), list_capacity(n), {}, std::vector<uint32_t>(kBins)};
  parallel_for(threads, n, 64 * kGrain, [&](int64_t begin, int64_t end) { sample(context, begin, end); });
  context.window = guess_window(context.keys, context.found, context.capacity, n, k);
  judge_all(context, threads);
  const bool listed = judged(context.window, context.above, context.found, n, k) && context.found <= context.capacity;
  if (!listed) fall_back(context, threads);

  const uint64_t threshold = settle(context.keys, context.found, context.window, context.counts.data());
  // The tie key is a bijection of the index, so a candidate's key alone says where it is.
  for (int64_t i = 0; i < context.found; ++i)
    if (context.keys[i] >= threshold) args.mask[index_of_tie_key(static_cast<uint32_t>(context.keys[i]))] = 1;
}

}  // namespace bip::cpu
