// Memory that faults: guarded arrays and stacks, and the signal handlers that turn a fault inside a kernel into an error of its launch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <new>
#include <vector>

namespace sim {

// `bytes` of zeros that end where a page that nobody may touch begins, to `align` bytes exactly; such a page lies in front as well.
struct Guarded {
  size_t page, room, offset;  // offset: from the start of the mapping to the array
  Guarded(size_t bytes, size_t align) : page(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    room = (bytes + align + page - 1) / page * page;
    offset = page + (room - bytes) / align * align;
  }
  void* allocate() const {
    void* memory = mmap(nullptr, room + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    char* base = static_cast<char*>(memory);
    mprotect(base, page, PROT_NONE);
    mprotect(base + page + room, page, PROT_NONE);
    return base + offset;
  }
  void free(void* pointer) const { munmap(static_cast<char*>(pointer) - offset, room + 2 * page); }
};

// `count` stacks of `bytes` each, the lowest page of each untouchable: a fibre that needs more faults.
inline char* allocate_stacks(size_t count, size_t bytes, size_t guard) {
  void* memory = mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < count; ++i) mprotect(static_cast<char*>(memory) + i * bytes, guard, PROT_NONE);
  return static_cast<char*>(memory);
}
inline void free_stacks(char* stacks, size_t count, size_t bytes) { munmap(stacks, count * bytes); }

// While it lives, a memory or arithmetic fault calls `on_fault` with a description. It returns only if the fault is none of its business:
// then the handlers of before are back, and get it. The handler has a stack of its own, which `on_fault` may leave for good (SA_NODEFER).
class CatchFaults {
 public:
  explicit CatchFaults(void (*on_fault)(const char* what)) : stack_(64 * 1024) {
    handler() = this;
    on_fault_ = on_fault;
    stack_t mine{};
    mine.ss_sp = stack_.data();
    mine.ss_size = stack_.size();
    sigaltstack(&mine, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &old_actions_[i]);
  }
  ~CatchFaults() {
    restore();
    sigaltstack(&old_stack_, nullptr);
  }
  CatchFaults(const CatchFaults&) = delete;
  CatchFaults& operator=(const CatchFaults&) = delete;

 private:
  static constexpr int kCount = 3;
  static constexpr int kSignals[kCount] = {SIGSEGV, SIGBUS, SIGFPE};

  static CatchFaults*& handler() {
    static CatchFaults* current = nullptr;
    return current;
  }

  static void on_signal(int signal, siginfo_t* info, void*) {
    char text[96];
    std::snprintf(text, sizeof text, "%s at address %p", signal == SIGFPE ? "arithmetic fault" : "access to memory that is not mapped",
                  info->si_addr);
    handler()->on_fault_(text);
    handler()->restore();
  }

  void restore() {
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &old_actions_[i], nullptr);
  }

  void (*on_fault_)(const char*);
  std::vector<char> stack_;
  stack_t old_stack_{};
  struct sigaction old_actions_[kCount];
};

}  // namespace sim
