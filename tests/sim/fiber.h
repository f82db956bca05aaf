// Fibres: a stack and the place where it stopped. Switching saves what the C calling convention lets a callee not touch.
// x86-64 and aarch64 Linux by hand (some 5 ns); anything else through ucontext, which makes a system call of every switch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sim {

using Entry = void (*)();  // never returns

#if defined(__x86_64__) && defined(__linux__)

using Context = void*;  // the stack pointer; the saved registers are on the stack
extern "C" void bip_sim_switch(Context* from, Context to);
asm(R"(
  .pushsection .text
  .globl bip_sim_switch
  .hidden bip_sim_switch
  .type bip_sim_switch, @function
bip_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size bip_sim_switch, .-bip_sim_switch
  .popsection
)");
inline void switch_context(Context& from, Context& to) { bip_sim_switch(&from, to); }
inline void make_context(Context& context, char* stack, size_t bytes, Entry entry) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // where entry() would return to; it also makes the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;  // whatever is there goes to rbp, rbx, r12 to r15
}

#elif defined(__aarch64__) && defined(__linux__)

using Context = void*;
extern "C" void bip_sim_switch(Context* from, Context to);
asm(R"(
  .pushsection .text
  .globl bip_sim_switch
  .hidden bip_sim_switch
  .type bip_sim_switch, %function
bip_sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size bip_sim_switch, .-bip_sim_switch
  .popsection
)");
inline void switch_context(Context& from, Context& to) { bip_sim_switch(&from, to); }
inline void make_context(Context& context, char* stack, size_t bytes, Entry entry) {
  char* top = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15}) - 160;
  *reinterpret_cast<void**>(top + 80) = nullptr;                         // x29: no outer frame
  *reinterpret_cast<void**>(top + 88) = reinterpret_cast<void*>(entry);  // x30: where the switch returns to
  context = top;
}

#else

}  // namespace sim
#include <ucontext.h>
namespace sim {
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, Entry entry) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

}  // namespace sim
