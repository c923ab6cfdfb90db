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

// Row-major C (m, n) = op(A) op(B) + beta·C, on this thread alone.
inline void gemm(const Problem& p, bool ta, bool tb, Int m, Int n, Int k, const float* a, Int lda, const float* b, Int ldb,
          float beta, float* c, Int ldc) {
  const int mi = int(m), ni = int(n), ki = int(k), ldai = int(lda), ldbi = int(ldb), ldci = int(ldc);
  const float one = 1;
  // BLAS is column-major: it computes Cᵀ = op(B)ᵀ op(A)ᵀ from the same memory.
  p.single_gemm(tb ? "T" : "N", ta ? "T" : "N", &ni, &mi, &ki, &one, b, &ldbi, a, &ldai, &beta, c, &ldci);
}

inline void gemm(const Problem& p, bool ta, bool tb, Int m, Int n, Int k, const bf16* a, Int lda, const bf16* b, Int ldb,
          float, bf16* c, Int ldc) {
  p.half_gemm(ta, tb, m, n, k, a, lda, b, ldb, c, ldc);
}

template <class S, class C>
struct Layer {
  static constexpr bool kConverts = !std::is_same_v<S, C>, kHasFew = std::is_same_v<C, float>;
  const Problem& p;
  const S *x = static_cast<const S*>(p.x), *grad = static_cast<const S*>(p.grad);
  const S *up = static_cast<const S*>(p.up), *down = static_cast<const S*>(p.down);
  S *hidden = static_cast<S*>(p.hidden), *out = static_cast<S*>(p.out);
  S *unit = static_cast<S*>(p.unit), *d_hidden = static_cast<S*>(p.d_hidden);

  // Rows r0 … r1 of the tokens' columns c0 … c1, in expert order.
  template <class T>
  void gather(const S* tokens, Int r0, Int r1, Int c0, Int c1, T* to) const {
    for (Int r = r0; r < r1; ++r, to += c1 - c0)
      convert(tokens + p.pair_of_row[r] / p.top_k * p.width + c0, to, c1 - c0);
  }

  // out (n, rows) = a (n, columns) wᵀ, or (n, columns) = a (n, rows) w, for a weight w (rows, columns).
  void times_weight(bool transposed, Int n, Int rows, Int columns, const C* a, const S* w, C* result, C* wide) const {
    if constexpr (kHasFew)
      if (!transposed && is_few(n)) return multiply_weight(n, columns, rows, a, rows, w, result);
    const Int step = kConverts ? std::clamp<Int>(kWidenedArea / columns, 1, rows) : rows;
    for (Int i = 0; i < rows; i += step) {
      const Int some = std::min(step, rows - i);
      const C* part;
      if constexpr (kConverts) {
        convert(w + i * columns, wide, some * columns);
        part = wide;
      } else {
        part = w;
      }
      if (transposed)
        gemm(p, false, true, n, some, columns, a, columns, part, columns, 0, result + i, rows);
      else
        gemm(p, false, false, n, columns, some, a + i, rows, part, columns, i > 0, result, columns);
    }
  }

  static Int wide_weight(Int rows, Int columns) { return kConverts ? std::min(rows * columns, kWidenedArea + columns) : 0; }

  // As forward_tile, on the transposes: hiddenᵀ = up·xᵀ and outᵀ = down·unitᵀ, which read a weight as it lies.
  void forward_few(const Task& t, Scratch scratch) const {
    const Int n = t.row1 - t.row0, D = p.width, H = p.rows_up, F = p.units;
    const Int padded = round_up(n, kPanel), columns = round_up(n, kLanes);
    float* outer = scratch.take<float>(padded * D);  // xᵀ, then outᵀ
    float* inner = scratch.take<float>(padded * H);  // hiddenᵀ, then unitᵀ
    float* units = scratch.take<float>(n * F);
    transpose_in([&](Int r) { return x + p.pair_of_row[t.row0 + r] / p.top_k * D; }, n, D, outer);
    multiply_panels(false, H, columns, D, up + t.expert * H * D, D, 1, outer, inner, kPanel, H * kPanel);
    transpose_out(inner, n, H, hidden + t.row0 * H);
    for (Int r = 0; r < n; ++r)
      activate_row(p.activation, hidden + (t.row0 + r) * H, p.weights[p.pair_of_row[t.row0 + r]], units + r * F, F);
    transpose_in([=](Int r) { return units + r * F; }, n, F, inner);
    multiply_panels(false, D, columns, F, down + t.expert * D * F, F, 1, inner, outer, kPanel, D * kPanel);
    transpose_out(outer, n, D, out + t.row0 * D);
  }

  void forward_tile(const Task& t, Scratch scratch) const {
    if constexpr (kHasFew)
      if (is_few(t.row1 - t.row0)) return forward_few(t, scratch);
    const Int n = t.row1 - t.row0, D = p.width, H = p.rows_up, F = p.units;
    C* rows = scratch.take<C>(n * D);
    C* units = scratch.take<C>(n * F);
    C* up_out = kConverts ? scratch.take<C>(n * H) : reinterpret_cast<C*>(hidden + t.row0 * H);
    C* wide = scratch.take<C>(std::max(wide_weight(H, D), wide_weight(D, F)));
    gather(x, t.row0, t.row1, 0, D, rows);
    times_weight(true, n, H, D, rows, up + t.expert * H * D, up_out, wide);
    if (kConverts) convert(up_out, hidden + t.row0 * H, n * H);
    for (Int r = 0; r < n; ++r)
      activate_row(p.activation, hidden + (t.row0 + r) * H, p.weights[p.pair_of_row[t.row0 + r]], units + r * F, F);
    C* result = kConverts ? rows : reinterpret_cast<C*>(out + t.row0 * D);
    times_weight(true, n, D, F, units, down + t.expert * D * F, result, wide);
    if (kConverts) convert(result, out + t.row0 * D, n * D);
  }

  void backward_tile(const Task& t, Scratch scratch) const {
    const Int n = t.row1 - t.row0, D = p.width, H = p.rows_up, F = p.units;
    if (!p.need_x && !p.need_weights && !p.need_up) {  // the unit is all that down_proj's gradient needs of this expert
      for (Int r = t.row0; r < t.row1; ++r)
        activate_row(p.activation, hidden + r * H, p.weights[p.pair_of_row[r]], unit + (r + t.shift) * F, F);
      return;
    }
    C* d_y = scratch.take<C>(n * D);
    C* d_unit = scratch.take<C>(n * F);
    S* spare = scratch.take<S>(F);
    const bool own = kConverts || !d_hidden;
    C* d_up_out = own ? scratch.take<C>(n * H) : reinterpret_cast<C*>(d_hidden + (t.row0 + t.shift) * H);
    C* wide = scratch.take<C>(std::max(wide_weight(H, D), wide_weight(D, F)));
    gather(grad, t.row0, t.row1, 0, D, d_y);
    times_weight(false, n, D, F, d_y, down + t.expert * D * F, d_unit, wide);
    for (Int r = 0; r < n; ++r) {
      const Int row = t.row0 + r;
      const float weight = p.weights[p.pair_of_row[row]];
      const float dot = activate_row_backward(p.activation, hidden + row * H, d_unit + r * F, weight,
                                              unit ? unit + (row + t.shift) * F : spare, d_up_out + r * H, F);
      if (p.need_weights) p.d_weight_of_row[row] = dot;
    }
    if (own && d_hidden) convert(d_up_out, d_hidden + (t.row0 + t.shift) * H, n * H);
    if (!p.need_x) return;
    C* result = kConverts ? d_y : reinterpret_cast<C*>(out + t.row0 * D);
    times_weight(false, n, H, D, d_up_out, up + t.expert * H * D, result, wide);
    if (kConverts) convert(result, out + t.row0 * D, n * D);
  }

  // Rows r0 … r1 and columns c0 … c1 of a product's operand and its row length; gathered from the tokens, or from rows
  // that are stored in expert order, which are copied only to widen them.
  const C* operand(const S* from, bool gathered, Int width, Int r0, Int r1, Int c0, Int c1, C* space, Int& ld) const {
    ld = c1 - c0;
    if (gathered) {
      gather(from, r0, r1, c0, c1, space);
    } else if constexpr (kConverts) {
      for (Int r = r0; r < r1; ++r) convert(from + r * width + c0, space + (r - r0) * ld, ld);
    } else {
      ld = width;
      return from + r0 * width + c0;
    }
    return space;
  }

  // A block of one expert's weight gradient leftᵀ right; left and right are d_hidden and x for up, d_y and unit for down.
  void gradient(const Task& t, Scratch scratch) const {
    const bool of_up = t.kind == kUpGrad;
    const Int I = t.i1 - t.i0, J = t.j1 - t.j0, columns = of_up ? p.width : p.units;
    S* block = static_cast<S*>(of_up ? p.d_up : p.d_down) + t.expert * p.width * (of_up ? p.rows_up : p.units) +
               t.i0 * columns + t.j0;
    constexpr bool in_place = std::is_same_v<S, float>;
    const Int most = std::min(kGradRows, t.row1 - t.row0);
    C* left_space = scratch.take<C>(most * I);
    C* right_space = scratch.take<C>(most * (is_few(t.row1 - t.row0) ? round_up(J, kPanel) : J));
    float* sum = in_place ? nullptr : scratch.take<float>(I * J);
    C* part = std::is_same_v<C, float> ? reinterpret_cast<C*>(sum) : scratch.take<C>(I * J);
    if (in_place) part = reinterpret_cast<C*>(block);
    for (Int r = t.row0; r < t.row1; r += kGradRows) {
      const Int end = std::min(r + kGradRows, t.row1);
      Int left_ld, right_ld;
      const C* left = of_up ? operand(d_hidden + t.shift * p.rows_up, false, p.rows_up, r, end, t.i0, t.i1, left_space, left_ld)
                            : operand(grad, true, p.width, r, end, t.i0, t.i1, left_space, left_ld);
      if constexpr (kHasFew)
        if (is_few(t.row1 - t.row0)) {
          for (Int row = r; row < end; ++row)
            pack_row(of_up ? x + p.pair_of_row[row] / p.top_k * p.width + t.j0 : unit + (row + t.shift) * p.units + t.j0, J,
                     end - r, row - r, right_space);
          multiply_panels(false, I, J, end - r, left, 1, left_ld, right_space, part, in_place ? columns : J, kPanel);
          continue;
        }
      const C* right = of_up ? operand(x, true, p.width, r, end, t.j0, t.j1, right_space, right_ld)
                             : operand(unit + t.shift * p.units, false, p.units, r, end, t.j0, t.j1, right_space, right_ld);
      gemm(p, true, false, I, J, end - r, left, left_ld, right, right_ld, r > t.row0, part, in_place ? columns : J);
      if constexpr (std::is_same_v<C, bf16>)  // such a product does not add to what is there
        for (Int k = 0; k < I * J; ++k) sum[k] = load(part + k) + (r > t.row0 ? sum[k] : 0);
    }
    if (!in_place)
      for (Int i = 0; i < I; ++i) convert(sum + i * J, block + i * columns, J);
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
