// What a task computes: the expert MLP's products, forward and backward, on one thread.
//
// S is the type of tensors in memory, C that of a product's operands: (float, float); (bf16, float) where the machine
// has no bf16 products, operands being widened a tile at a time; (bf16, bf16) where it has.

#pragma once

#include "tasks.h"

namespace himoe {

// One thread's scratch, handed out piece by piece.
struct Scratch {
  float* at;
  template <class T>
  T* take(Int n) {
    T* piece = reinterpret_cast<T*>(at);
    at += round_up(n * Int(sizeof(T)), 64) / Int(sizeof(float));
    return piece;
  }
};

template <class S, class C>
struct Layer {
  static constexpr bool kConverts = !std::is_same_v<S, C>, kHalf = std::is_same_v<C, bf16>;
  const Problem& p;
  const S *x = static_cast<const S*>(p.x), *grad = static_cast<const S*>(p.grad);
  const S *up = static_cast<const S*>(p.up), *down = static_cast<const S*>(p.down);
  S *hidden = static_cast<S*>(p.hidden), *out = static_cast<S*>(p.out);
  S *unit = static_cast<S*>(p.unit), *d_hidden = static_cast<S*>(p.d_hidden);

  // The row of (T, D) tokens that stands at `row` in expert order.
  const S* token(const S* tokens, Int row) const { return tokens + p.pair_of_row[row] / p.top_k * p.width; }
  float routing_weight(Int row) const { return p.weights[p.pair_of_row[row]]; }

  // As multiply_weight of gemm.h.
  template <class Fill>
  void times_weight(bool transposed, Int n, Int columns, Int depth, const Fill& fill, const S* weight, C* result,
                    Scratch scratch) const {
    if constexpr (kHalf) {
      C* left = scratch.take<C>(n * depth);
      for (Int r = 0; r < n; ++r) fill(r, 0, depth, left + r * depth);
      const Int row = transposed ? depth : columns;
      p.half_gemm(false, transposed, n, columns, depth, left, depth, weight, row, result, columns);
    } else {
      float* space = scratch.take<float>(weight_floats(transposed, n, columns, depth));
      multiply_weight(transposed, n, columns, depth, fill, weight, result, space);
    }
  }

  // As forward_tile, on the transposes: hiddenᵀ = up·xᵀ and outᵀ = down·unitᵀ, which read a weight as it lies.
  void forward_columns(const Task& t, Scratch scratch) const {
    const Int n = t.row1 - t.row0, D = p.width, H = p.rows_up, F = p.units;
    const Int padded = round_up(n, kPanel), columns = round_up(n, kLanes);
    float* outer = scratch.take<float>(padded * D);  // xᵀ, then outᵀ
    float* inner = scratch.take<float>(padded * H);  // hiddenᵀ, then unitᵀ
    float* units = scratch.take<float>(n * F);
    pack_columns([&](Int r) { return token(x, t.row0 + r); }, n, D, outer);
    multiply_columns(H, columns, D, up + t.expert * H * D, outer, inner);
    unpack_columns(inner, n, H, hidden + t.row0 * H);
    for (Int r = 0; r < n; ++r)
      activate_row(p.activation, hidden + (t.row0 + r) * H, F, routing_weight(t.row0 + r), units + r * F, F);
    pack_columns([=](Int r) { return units + r * F; }, n, F, inner);
    multiply_columns(D, columns, F, down + t.expert * D * F, inner, outer);
    unpack_columns(outer, n, D, out + t.row0 * D);
  }

  void forward_tile(const Task& t, Scratch scratch) const {
    if constexpr (!kHalf)
      if (takes_columns(p, t.row1 - t.row0)) return forward_columns(t, scratch);
    const Int n = t.row1 - t.row0, D = p.width, H = p.rows_up, F = p.units;
    const auto tokens = [&](Int r, Int k, Int some, C* to) { convert(token(x, t.row0 + r) + k, to, some); };
    const auto units = [&](Int r, Int k, Int some, C* to) {
      activate_row(p.activation, hidden + (t.row0 + r) * H + k, F, routing_weight(t.row0 + r), to, some);
    };
    C* up_out = kConverts ? scratch.take<C>(n * H) : reinterpret_cast<C*>(hidden + t.row0 * H);
    C* result = kConverts ? scratch.take<C>(n * D) : reinterpret_cast<C*>(out + t.row0 * D);
    times_weight(true, n, H, D, tokens, up + t.expert * H * D, up_out, scratch);
    if (kConverts) convert(up_out, hidden + t.row0 * H, n * H);
    times_weight(true, n, D, F, units, down + t.expert * D * F, result, scratch);
    if (kConverts) convert(result, out + t.row0 * D, n * D);
  }

  void backward_tile(const Task& t, Scratch scratch) const {
    const Int n = t.row1 - t.row0, D = p.width, H = p.rows_up, F = p.units;
    if (!p.need_x && !p.need_weights && !p.need_up) {  // the unit is all that down_proj's gradient needs of this expert
      for (Int r = t.row0; r < t.row1; ++r)
        activate_row(p.activation, hidden + r * H, F, routing_weight(r), unit + (r + t.shift) * F, F);
      return;
    }
    C* d_unit = scratch.take<C>(n * F);
    S* spare = scratch.take<S>(F);
    const bool own = kConverts || !d_hidden;
    C* d_up_out = own ? scratch.take<C>(n * H) : reinterpret_cast<C*>(d_hidden + (t.row0 + t.shift) * H);
    C* result = kConverts ? scratch.take<C>(n * D) : p.need_x ? reinterpret_cast<C*>(out + t.row0 * D) : nullptr;
    const auto d_y = [&](Int r, Int k, Int some, C* to) { convert(token(grad, t.row0 + r) + k, to, some); };
    const auto d_rows = [=](Int r, Int k, Int some, C* to) { convert(d_up_out + r * H + k, to, some); };
    times_weight(false, n, F, D, d_y, down + t.expert * D * F, d_unit, scratch);
    for (Int r = 0; r < n; ++r) {
      const Int row = t.row0 + r;
      const float dot = activate_row_backward(p.activation, hidden + row * H, d_unit + r * F, routing_weight(row),
                                              unit ? unit + (row + t.shift) * F : spare, d_up_out + r * H, F);
      if (p.need_weights) p.d_weight_of_row[row] = dot;
    }
    if (own && d_hidden) convert(d_up_out, d_hidden + (t.row0 + t.shift) * H, n * H);
    if (!p.need_x) return;
    times_weight(false, n, D, H, d_rows, up + t.expert * H * D, result, scratch);
    if (kConverts) convert(result, out + t.row0 * D, n * D);
  }

  // A block of one expert's weight gradient leftᵀ right: of d_hidden and x for up, of d_y and unit for down.
  void gradient(const Task& t, Scratch scratch) const {
    const bool of_up = t.kind == kUpGrad;
    const Int I = t.i1 - t.i0, J = t.j1 - t.j0, n = t.row1 - t.row0, columns = of_up ? p.width : p.units;
    S* block = static_cast<S*>(of_up ? p.d_up : p.d_down) + t.expert * p.width * (of_up ? p.rows_up : p.units) +
               t.i0 * columns + t.j0;
    const auto left = [&](Int r) {
      const Int row = t.row0 + r;
      return (of_up ? d_hidden + (row + t.shift) * p.rows_up : token(grad, row)) + t.i0;
    };
    const auto right = [&](Int r) {
      const Int row = t.row0 + r;
      return (of_up ? token(x, row) : unit + (row + t.shift) * p.units) + t.j0;
    };
    if constexpr (std::is_same_v<S, float>) {
      const Int numbers = p.experts * p.width * (p.need_up * p.rows_up + p.need_down * p.units);
      const bool large = numbers * Int(sizeof(float)) > kL3;
      multiply_transposed(large, I, J, n, left, right, block, columns, scratch.take<float>(kGradientFloats));
    } else {
      float* sum = scratch.take<float>(I * J);
      if constexpr (kHalf)
        sum_of_halves(I, J, n, left, right, sum, scratch);
      else
        multiply_transposed(false, I, J, n, left, right, sum, J, scratch.take<float>(kGradientFloats));
      for (Int i = 0; i < I; ++i) convert(sum + i * J, block + i * columns, J);
    }
  }

  // As multiply_transposed, but such a product does not add to what is there.
  template <class Left, class Right>
  void sum_of_halves(Int I, Int J, Int n, const Left& left, const Right& right, float* sum, Scratch scratch) const {
    C* left_rows = scratch.take<C>(std::min(kHalfDepth, n) * I);
    C* right_rows = scratch.take<C>(std::min(kHalfDepth, n) * J);
    C* part = scratch.take<C>(I * J);
    for (Int k = 0; k < n; k += kHalfDepth) {
      const Int some = std::min(kHalfDepth, n - k);
      for (Int r = 0; r < some; ++r) {
        convert(left(k + r), left_rows + r * I, I);
        convert(right(k + r), right_rows + r * J, J);
      }
      p.half_gemm(true, false, I, J, some, left_rows, I, right_rows, J, part, J);
      for (Int i = 0; i < I * J; ++i) sum[i] = load(part + i) + (k > 0 ? sum[i] : 0);
    }
  }

  void zero_gradient(const Task& t) const {
    const Int up_size = p.rows_up * p.width, down_size = p.width * p.units;
    if (p.need_up) std::memset(static_cast<S*>(p.d_up) + t.expert * up_size, 0, up_size * sizeof(S));
    if (p.need_down) std::memset(static_cast<S*>(p.d_down) + t.expert * down_size, 0, down_size * sizeof(S));
  }

  // y of token t: the sum of its kept rows, in the order of its choices.
  void combine(Int token, float* sum) const {
    const Int D = p.width, kept = kept_rows(p);
    std::fill(sum, sum + D, 0.0f);
    for (Int k = 0; k < p.top_k; ++k) {
      const Int row = p.row_of_pair[token * p.top_k + k];
      if (row >= kept) continue;
      const S* value = out + row * D;
      for (Int i = 0; i < D; ++i) sum[i] += load(value + i);
    }
    convert(sum, static_cast<S*>(p.y) + token * D, D);
  }

  void run_task(const Task& t, Scratch scratch) const {
    switch (t.kind) {
      case kForwardTile: return forward_tile(t, scratch);
      case kBackwardTile: return backward_tile(t, scratch);
      case kZeroGrad: return zero_gradient(t);
      default: return gradient(t, scratch);
    }
  }
};

}  // namespace himoe
