// What the sanitizers of .ci/sanitize have to be told of fibres. Nothing in an ordinary build.
//
// AddressSanitizer: which stack is in use, and that a new fibre's has no variables on it.
// ThreadSanitizer: which fibre runs, and what orders the accesses of one before those of another, as CUDA has it: a launch, barriers,
// __syncwarp, and fences, each of which sees what came before the fences that were earlier. Shuffles, ballots and atomics order nothing.
// So it finds races between threads, and fences that are missing, in the order that was run. What it does not see: a race between blocks in
// shared memory (there is none), accesses to it on both sides of a change of blocks, and a warp's lanes that synchronise in two parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(BIP_SIM_THREAD_SANITIZER)  // simulator.cpp itself is not instrumented: it is the scheduler, not a thread of a kernel
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_java_init(uintptr_t begin, uintptr_t bytes);
void __tsan_java_alloc(uintptr_t begin, uintptr_t bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace sim {

// How a sanitizer knows a fibre.
struct Known {
  char* stack = nullptr;
  size_t bytes = 0;
  void* handle = nullptr;
  void* other = nullptr;  // that of the thread before it on this stack, which was of another block
};

#if defined(__SANITIZE_ADDRESS__)

inline void know_host(Known&) {}
inline void know(Known& fiber, char* stack, size_t bytes) {
  fiber.stack = stack;
  fiber.bytes = bytes;
  __asan_unpoison_memory_region(stack, bytes);
}
// In the host, before and after a fibre runs.
inline void before_fiber(Known& host, const Known& fiber) { __sanitizer_start_switch_fiber(&host.handle, fiber.stack, fiber.bytes); }
inline void after_fiber(Known& host) { __sanitizer_finish_switch_fiber(host.handle, nullptr, nullptr); }
// In a fibre, when it has got control and before it gives it back.
inline void fiber_runs(Known& host, Known& fiber) {
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(fiber.handle, &stack, &host.bytes);
  host.stack = static_cast<char*>(const_cast<void*>(stack));
}
inline void fiber_stops(Known& host, Known& fiber, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.handle, host.stack, host.bytes);
}
inline void release(void*) {}
inline void acquire(void*) {}
inline void forget(char*, size_t) {}
struct Unseen {
  Unseen() {}
};

#elif defined(BIP_SIM_THREAD_SANITIZER)

inline void know_host(Known& host) { host.handle = __tsan_get_current_fiber(); }
// Nobody has been at these bytes yet.
inline void forget(char* begin, size_t bytes) {
  // The address space is declared a heap of Java, whose allocations forget.
  static const bool once = (__tsan_java_init(8, (uintptr_t{1} << 47) - 8), true);
  static_cast<void>(once);
  __tsan_java_alloc(reinterpret_cast<uintptr_t>(begin) & ~uintptr_t{7}, (bytes + 15) & ~size_t{7});
}
// Fibres are slow to make and stay. Two for each stack: the next block's threads are others than those of the block before.
inline void know(Known& fiber, char* stack, size_t bytes) {
  std::swap(fiber.handle, fiber.other);
  if (!fiber.handle) fiber.handle = __tsan_create_fiber(0);
  constexpr size_t kUsed = 16 * 1024;  // more than kernels do use
  forget(stack + bytes - kUsed, kUsed - 8);
}
inline void before_fiber(Known&, const Known& fiber) { __tsan_switch_to_fiber(fiber.handle, __tsan_switch_to_fiber_no_sync); }
inline void after_fiber(Known&) {}
inline void fiber_runs(Known&, Known&) {}
inline void fiber_stops(Known& host, Known&, bool) { __tsan_switch_to_fiber(host.handle, __tsan_switch_to_fiber_no_sync); }
inline void release(void* what) { __tsan_release(what); }
inline void acquire(void* what) { __tsan_acquire(what); }
// While it lives, the accesses of the simulator itself are none of the kernel's.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

#else

inline void know_host(Known&) {}
inline void know(Known&, char*, size_t) {}
inline void before_fiber(Known&, const Known&) {}
inline void after_fiber(Known&) {}
inline void fiber_runs(Known&, Known&) {}
inline void fiber_stops(Known&, Known&, bool) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void forget(char*, size_t) {}
struct Unseen {
  Unseen() {}
};

#endif

}  // namespace sim
