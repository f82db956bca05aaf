// One weight's lower and upper update: the only place with the formulas.
//
//   lower (paper A3)      d = m*g + weight_decay*theta;  v = momentum*v + d;  theta = theta - lr*v   (nesterov: d + momentum*v)
//   upper (paper A4, A5)  h = (theta - m*g/gamma)*g;  u = mask_momentum*u + h;  s = clip(s - mask_lr*u, 0, 1)
//
// Compiled without FMA contraction on every backend, so fp32 results agree bit for bit. Branch-free, so compilers vectorise it.
#pragma once

#include <cstdint>
#include <cstring>

#include "bip.h"
#include "hd.h"

namespace bip {

BIP_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

BIP_HD bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// An entry whose g is not finite keeps all its state: callers ask is_finite(g) and select between old and new.
BIP_HD void lower_update(bool kept, float g, const Hyper& hyper, float& theta, float& v) {
  const float d = (kept ? g : 0.0f) + hyper.weight_decay * theta;
  v = hyper.momentum * v + d;
  const float direction = hyper.nesterov ? d + hyper.momentum * v : v;
  theta = theta - hyper.lr * direction;
}

BIP_HD float score_gradient(bool kept, float g, float theta, const Hyper& hyper) {
  return (theta - (kept ? g : 0.0f) * hyper.inv_gamma) * g;
}

// `u` is score_gradient() itself, or its running momentum. The comparisons turn a NaN (an overflowed theta) into 0, so no score is NaN.
BIP_HD float updated_score(float s, float u, const Hyper& hyper) {
  const float x = s - hyper.mask_lr * u;
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}

}  // namespace bip
