// bf16 and fp16 <-> fp32, round to nearest even, in integer arithmetic that compilers vectorise and that gives the same bits everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "bip.h"
#include "hd.h"
#include "update_rule.h"

namespace bip {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

BIP_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

BIP_HD float to_float(float x) { return x; }

BIP_HD float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

BIP_HD float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Normal numbers: move the exponent up by 127 - 15. Inf and NaN: move it to the top. Subnormals: an exact product with 2^-24.
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f);
  return bits_float(sign | (magnitude < 0x0400u ? subnormal : normal));
}

BIP_HD void from_float(float x, float& out) { out = x; }

BIP_HD void from_float(float x, bfloat16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

BIP_HD void from_float(float x, float16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias, round the 13 lost bits to even. Below 2^-14: adding 0.5 lets the adder itself round to multiples of 2^-24.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t nan_or_inf = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  out.bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? nan_or_inf : finite));
}

}  // namespace bip
