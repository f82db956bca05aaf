// One weight's lower and upper update: the only place with the formulas.
//
//   lower (paper A3)      d = m*g + weight_decay*theta;  v = momentum*v + d;  theta = theta - lr*v   (nesterov: d + momentum*v)
//   lower, AdamW          d = m*g;  a = beta1*a + (1 - beta1)*d;  b = beta2*b + (1 - beta2)*d*d
//   (Loshchilov, Hutter)  theta = theta*(1 - lr*weight_decay) - lr * (a / (1 - beta1^t)) / (sqrt(b / (1 - beta2^t)) + eps)
//   upper (paper A4, A5)  h = (theta - m*g/gamma)*g;  u = mask_momentum*u + h;  s = clip(s - mask_lr*u, 0, 1)
//
// Compiled without FMA contraction on every backend, so fp32 results agree bit for bit; division and square root are correctly rounded
// everywhere (IEEE 754 on processors, the _rn intrinsics on CUDA), and powers are products. Branch-free, so compilers vectorise it.
#pragma once

#include <cmath>
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

BIP_HD float exact_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

BIP_HD float exact_divide(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}

// By repeated squaring: no library's pow has the same bits everywhere.
BIP_HD double power(double base, int64_t exponent) {
  double product = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) product *= base;
    base *= base;
  }
  return product;
}

// What all entries of a tensor share in its t-th step, t >= 1. Computed in double, each rounded once.
struct AdamwFactors {
  float beta1, rest1;  // and 1 - beta1
  float beta2, rest2;
  float decay;  // 1 - lr*weight_decay
  float size;   // lr / (1 - beta1^t)
  float root;   // 1 / sqrt(1 - beta2^t)
  float eps;
};

BIP_HD AdamwFactors adamw_factors(const Hyper& hyper, int64_t t) {
  const double lr = hyper.lr;
  return {static_cast<float>(hyper.beta1),
          static_cast<float>(1.0 - hyper.beta1),
          static_cast<float>(hyper.beta2),
          static_cast<float>(1.0 - hyper.beta2),
          static_cast<float>(1.0 - lr * static_cast<double>(hyper.weight_decay)),
          static_cast<float>(lr / (1.0 - power(hyper.beta1, t))),
          static_cast<float>(1.0 / sqrt(1.0 - power(hyper.beta2, t))),
          hyper.eps};
}

BIP_HD void adamw_update(bool kept, float g, const AdamwFactors& factors, float& theta, float& a, float& b) {
  const float d = kept ? g : 0.0f;
  a = factors.beta1 * a + factors.rest1 * d;
  b = factors.beta2 * b + factors.rest2 * (d * d);
  const float denominator = exact_sqrt(b) * factors.root + factors.eps;
  theta = theta * factors.decay - factors.size * exact_divide(a, denominator);
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
