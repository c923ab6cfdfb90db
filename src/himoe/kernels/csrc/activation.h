// Numbers in memory, and the activations of an expert row by row, forward and backward; as kernels/activation.py.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace himoe {

using Int = std::int64_t;
struct bf16 {
  std::uint16_t bits;
};
enum Activation : Int { kSwiglu, kGelu, kRelu, kRelu2 };

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) {
  std::uint32_t bits = std::uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* p, float value) { *p = value; }
inline void store(bf16* p, float value) {  // to the nearest, ties to even; a NaN stays one
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  p->bits = std::uint16_t(value == value ? rounded : (bits >> 16) | 0x40);
}

template <class From, class To>
void convert(const From* from, To* to, Int n) {
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, n * sizeof(To));
  else
    for (Int i = 0; i < n; ++i) store(to + i, load(from + i));
}

// x, or the limit where x is beyond it, without a branch: of branches GCC makes paths for the limits alone, which
// double the work of a vectorized loop.
inline float limited(float x, float limit, bool beyond) {
  std::uint32_t bits, limits, mask = -std::uint32_t(beyond);
  std::memcpy(&bits, &x, 4), std::memcpy(&limits, &limit, 4);
  bits = (bits & ~mask) | (limits & mask);
  std::memcpy(&x, &bits, 4);
  return x;
}

// exp to about 1 ulp, 0 and ∞ where a normal float ends. Written so that compilers vectorize it.
inline float exponential(float x) {
  x = limited(x, 89.0f, x > 89.0f);
  x = limited(x, -88.0f, x < -88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2²³: the sum's last bits are round(x / ln 2)
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;  // the shift drops what is above
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

struct Slope {
  float value, slope;
};

// The normal distribution's Φ and its density from one exponential: Abramowitz and Stegun 7.1.26, error below 1.5e-7.
inline Slope normal(float x) {
  const float z = std::fabs(x) * 0.70710678f, e = exponential(-z * z), t = 1.0f / (1.0f + 0.3275911f * z);
  const float tail =
      0.5f * e * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return {x < 0 ? tail : 1.0f - tail, e * 0.39894228f};
}

// An activation of one argument and its derivative, both 0 for a ReLU at 0; a NaN stays one.
template <Int activation>
inline Slope activate(float h) {
  if constexpr (activation == kSwiglu) {  // silu, of the gate
    const float s = 1.0f / (1.0f + exponential(-h));
    return {h * s, s * (1.0f + h * (1.0f - s))};
  } else if constexpr (activation == kGelu) {
    const Slope phi = normal(h);
    return {h * phi.value, phi.value + h * phi.slope};
  } else if constexpr (activation == kRelu) {
    return {h <= 0 ? 0.0f : h, h <= 0 ? 0.0f : 1.0f};
  } else {
    const float positive = h <= 0 ? 0.0f : h;
    return {positive * positive, 2.0f * positive};
  }
}

// Calls body(std::integral_constant) with the activation, so that the loop inside knows it.
template <class Body>
auto with(Int activation, const Body& body) {
  switch (activation) {
    case kSwiglu: return body(std::integral_constant<Int, kSwiglu>{});
    case kGelu: return body(std::integral_constant<Int, kGelu>{});
    case kRelu: return body(std::integral_constant<Int, kRelu>{});
    default: return body(std::integral_constant<Int, kRelu2>{});
  }
}

// Some units of one row: unit = weight·act(h). A gate's value stands `units` behind it. Functions of their own, as GCC
// takes what a lambda has captured to change with every number that is stored, and then does not vectorize.
template <Int activation, class S, class C>
void activate_units(const S* __restrict h, Int units, float weight, C* __restrict unit, Int some) {
#pragma omp simd
  for (Int i = 0; i < some; ++i) {
    float a = activate<activation>(load(h + i)).value;
    if constexpr (activation == kSwiglu) a *= load(h + units + i);
    store(unit + i, a * weight);
  }
}

template <class S, class C>
void activate_row(Int activation, const S* h, Int units, float weight, C* unit, Int some) {
  with(activation, [&](auto known) { activate_units<known>(h, units, weight, unit, some); });
}

template <Int activation, class S, class C>
float activate_units_backward(const S* __restrict h, const C* __restrict d_unit, float weight, S* __restrict unit,
                              C* __restrict d_hidden, Int units) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (Int i = 0; i < units; ++i) {
    const Slope act = activate<activation>(load(h + i));
    const float d = load(d_unit + i), dw = d * weight;
    float a = act.value;
    if constexpr (activation == kSwiglu) {
      const float value = load(h + units + i);
      store(d_hidden + units + i, dw * a);
      store(d_hidden + i, dw * value * act.slope);
      a *= value;
    } else {
      store(d_hidden + i, dw * act.slope);
    }
    dot += d * a;
    store(unit + i, a * weight);
  }
  return dot;
}

// One row: from hidden and the gradient of weight·act(h), the weight's gradient (returned), the unit and hidden's
// gradient.
template <class S, class C>
float activate_row_backward(Int activation, const S* h, const C* d_unit, float weight, S* unit, C* d_hidden,
                            Int units) {
  return with(activation, [&](auto known) {
    return activate_units_backward<known>(h, d_unit, weight, unit, d_hidden, units);
  });
}

}  // namespace himoe
