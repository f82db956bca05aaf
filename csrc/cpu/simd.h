// Run-time choice of the instruction set. A hot loop is written once as an always-inline template; BIP_SIMD_VARIANTS compiles it for each
// set.
#pragma once

#include "hd.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define BIP_SIMD_X86 1
#define BIP_TARGET_AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt,f16c")))
#if defined(__clang__)  // takes the widest registers by itself, and would ignore the whole list for one word that it does not know
#define BIP_WIDEST
#else
#define BIP_WIDEST ",prefer-vector-width=512"
#endif
#define BIP_TARGET_AVX512 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt,f16c,avx512f,avx512bw,avx512vl,avx512dq" BIP_WIDEST)))
#endif

namespace bip::cpu {

enum class Simd { baseline, avx2, avx512 };

// The widest set this processor has; the environment variable BIP_FAST_SIMD (baseline, avx2, avx512) can only lower it.
Simd simd_level();

}  // namespace bip::cpu

// Defines name(args) that calls name_body(args) compiled for the instruction set of this machine. The choice never changes a bit of the
// result.
#if defined(BIP_SIMD_X86)
#define BIP_SIMD_VARIANTS(name, params, args)                       \
  BIP_TARGET_AVX512 void name##_avx512 params { name##_body args; } \
  BIP_TARGET_AVX2 void name##_avx2 params { name##_body args; }     \
  void name##_baseline params { name##_body args; }                 \
  void name params {                                                \
    switch (simd_level()) {                                         \
      case Simd::avx512: return name##_avx512 args;                 \
      case Simd::avx2: return name##_avx2 args;                     \
      case Simd::baseline: return name##_baseline args;             \
    }                                                               \
  }
#else
#define BIP_SIMD_VARIANTS(name, params, args) \
  void name params { name##_body args; }
#endif
