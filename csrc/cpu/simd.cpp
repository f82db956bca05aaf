#include "cpu/simd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "bip.h"

namespace bip::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Simd processor_level() {
#if defined(BIP_SIMD_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return Simd::avx512;
  if (avx2) return Simd::avx2;
#endif
  return Simd::baseline;
}

Simd chosen_level() {
  const Simd widest = processor_level();
  const char* wish = std::getenv("BIP_FAST_SIMD");
  for (Simd level : {Simd::baseline, Simd::avx2, Simd::avx512})
    if (wish && std::strcmp(wish, kNames[static_cast<int>(level)]) == 0) return std::min(level, widest);
  return widest;
}

}  // namespace

Simd simd_level() {
  static const Simd level = chosen_level();
  return level;
}

const char* simd() { return kNames[static_cast<int>(simd_level())]; }

}  // namespace bip::cpu
