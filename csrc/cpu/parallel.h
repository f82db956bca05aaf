// Threads for the CPU kernels: one pool per process, made at the first call that needs it.
//
// A pool of our own and not OpenMP: torch brings an OpenMP runtime in its wheel, and a second one in the process oversubscribes the cores.
// A child made by fork() has no threads of its parent, so it starts a fresh pool. A call that finds the pool at work runs on its own
// thread.
#pragma once

#include <cstdint>

namespace bip::cpu {

// Runs body(context, begin, end) over [0, count) in pieces of at most `grain`, on at most `threads` threads. Any piece may run anywhere.
void parallel_for(int threads, int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);

template <class Body>
void parallel_for(int threads, int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      threads, count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace bip::cpu
