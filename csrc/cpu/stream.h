// Stores that pass the caches by, for what nobody reads soon.
//
// An ordinary store to a line that is in no cache first reads it: z would cost 8 bytes of an fp32 weight instead of 4. A step that moves more
// than caches hold has pushed the first z out again before the forward pass reads it, so nothing is lost. Lines are written whole, by the
// widest register there is: in pieces they wait in the few buffers of the processor.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace bip::cpu {

constexpr int64_t kStreamFrom = 4096;  // tiles of a step: some 100 MB of traffic
constexpr int kLine = 64;              // bytes of a cache line

// Bytes of the registers that stream, 0 where stores do not: a step is small, or the processor has only the baseline's registers.
inline int stream_width(int64_t tiles) {
  if (tiles < kStreamFrom || simd_level() == Simd::baseline) return 0;
  return simd_level() == Simd::avx512 ? 64 : 32;
}

inline bool starts_line(const void* to) { return reinterpret_cast<uintptr_t>(to) % kLine == 0; }

// What one instruction moves.
template <int kBytes>
struct Piece {
  char bytes[kBytes];
};

// Copies whole lines; both pointers start one. In assembler, because this is inlined into one loop for every instruction set, and an
// intrinsic can only be where its own set is. Every piece is an operand of its own: an offset before an operand is not something that all
// assemblers read.
template <class T, int kCount>
BIP_HD void stream_lines(const T (&values)[kCount], T* to, int width) {
#if defined(BIP_SIMD_X86)
  constexpr int kBytes = sizeof values;
  static_assert(kBytes % kLine == 0);
  if (width == 64) {
    const auto* from = reinterpret_cast<const Piece<64>*>(values);
    auto* pieces = reinterpret_cast<Piece<64>*>(to);
    for (int i = 0; i < kBytes / 64; ++i)
      asm volatile("vmovdqa64 %1, %%zmm15\n\tvmovntdq %%zmm15, %0" : "=m"(pieces[i]) : "m"(from[i]) : "xmm15");
  } else {
    const auto* from = reinterpret_cast<const Piece<32>*>(values);
    auto* pieces = reinterpret_cast<Piece<32>*>(to);
    for (int i = 0; i < kBytes / 32; ++i)
      asm volatile("vmovdqa %1, %%ymm15\n\tvmovntdq %%ymm15, %0" : "=m"(pieces[i]) : "m"(from[i]) : "xmm15");
  }
#else
  static_cast<void>(width);
  for (int i = 0; i < kCount; ++i) to[i] = values[i];
#endif
}

// Streamed lines come before whatever this thread does next, in the eyes of other threads.
inline void end_streaming() {
#if defined(BIP_SIMD_X86)
  __builtin_ia32_sfence();
#endif
}

}  // namespace bip::cpu
