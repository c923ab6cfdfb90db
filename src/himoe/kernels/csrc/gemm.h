// Products on one thread, in fp32; operands that lie in memory as bf16 are widened where they are packed.
//
// A product is cut as BLIS does: kDepth numbers of every sum at a time, a panel of B (two vectors wide) in the L1
// cache, rows of A in the L2 cache; where A is a weight that is read as it lies, panels of B are in the L2 cache. One
// microkernel, in the vector extensions of GCC and Clang, keeps 6 rows of C by two vectors in registers. Why not BLAS:
// packing is one with what has to be done anyway (gathering tokens, activation, widening); what that is worth stands in
// docs/results/layer.md.

#pragma once

#include "pack.h"

namespace himoe {

constexpr Int kDepth = 256;       // numbers of a sum at a time: with AVX2 a panel of them is half of an L1 cache
constexpr Int kLongDepth = 1024;  // the same where A is a weight that is read as it lies: long pieces of few rows
constexpr Int kWide = 256;        // columns of B packed at a time
constexpr Int kStrip = 96;        // columns of a transposed A packed at a time

// Where a product goes: C = A B, C + A B, or C = A B past the caches, for a C of whole cache lines.
enum class Into { kNew, kSum, kStream };

// C (R, V vectors) from A B. A's steps along rows and along the sum are any. The rows at `next` are fetched to the L1
// cache meanwhile: with each tile new streams begin, which hardware sees too late.
template <int R, int V>
inline __attribute__((always_inline)) void multiply_tile(Into into, Int depth, const float* a, Int a_row, Int a_step,
                                                         const float* next, const float* b, float* c, Int c_row) {
  constexpr Int kSteps = kLine / sizeof(float);
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = into == Into::kSum ? Vec(*reinterpret_cast<const LooseVec*>(c + r * c_row + v * kLanes)) : Vec{};
  const auto add_products = [&]() __attribute__((always_inline)) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = *reinterpret_cast<const Vec*>(b + v * kLanes);
#if defined(__AVX__)
    for (int v = 0; v < V; ++v) asm("" : "+x"(right[v]));  // or GCC reads it from memory for every row
#endif
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += right[v] * a[r * a_row];
    a += a_step, b += kPanel;
  };
  for (; depth >= kSteps; depth -= kSteps, next += kSteps * a_step) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * (a_step == 1 ? a_row : kSteps));
#pragma GCC unroll 8
    for (Int i = 0; i < kSteps; ++i) add_products();  // steps of a constant number, or GCC may keep sums in memory
  }
  for (; depth > 0; --depth) add_products();
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * kLanes;
      if (into == Into::kStream)
        stream(to, sum[r][v]);
      else
        *reinterpret_cast<LooseVec*>(to) = sum[r][v];
    }
}

// How A lies: row after row, or in blocks of kTileRows rows, each transposed (pack_blocks); a_row is then block_depth.
enum class Left { kRows, kBlocks };

template <Left left, int R, int V>
void multiply_rows(Into into, Int m, Int depth, const float* a, Int a_row, const float* next, const float* b, float* c,
                   Int c_row) {
  constexpr bool rows = left == Left::kRows;
  if constexpr (R == 1 && V == 1) {
    // As two rows, without GCC's knowing that they are one: of a single sum it makes no FMAs, which would round it
    // unlike the same row in company.
    Int none = 0;
    asm("" : "+r"(none));
    if (m > 0) multiply_tile<2, 1>(into, depth, a, none, rows ? 1 : kTileRows, next, b, c, none);
    return;
  }
  for (; m >= R; m -= R, a += R * a_row, c += R * c_row)
    multiply_tile<R, V>(into, depth, a, rows ? a_row : 1, rows ? 1 : kTileRows, m > R ? a + R * a_row : next, b, c,
                        c_row);
  if constexpr (R > 1)
    if (m > 0) multiply_rows<left, R - 1, V>(into, m, depth, a, a_row, next, b, c, c_row);
}

// C (m, columns) from A panel; `next` is what is read after A. Columns that are no whole vectors take a way through the
// stack.
template <Left left>
void multiply_panel(Into into, Int m, Int columns, Int depth, const float* a, Int a_row, const float* next,
                    const float* panel, float* c, Int c_row) {
  if (columns == kPanel) return multiply_rows<left, kTileRows, 2>(into, m, depth, a, a_row, next, panel, c, c_row);
  if (columns == kLanes) return multiply_rows<left, kTileRows, 1>(into, m, depth, a, a_row, next, panel, c, c_row);
  for (; m > 0; m -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row) {
    alignas(64) float tile[kTileRows * kPanel];
    const Int rows = std::min(m, kTileRows);
    for (Int r = 0; into == Into::kSum && r < rows; ++r) convert(c + r * c_row, tile + r * kPanel, columns);
    multiply_rows<left, kTileRows, 2>(into, rows, depth, a, a_row, next, panel, tile, kPanel);
    for (Int r = 0; r < rows; ++r) convert(tile + r * kPanel, c + r * c_row, columns);
  }
}

inline Into sum_from(Int k) { return k > 0 ? Into::kSum : Into::kNew; }

// Whether sums of several parts stay in panels until they are whole, kLongRow columns at a time: rows of C that lie
// pages apart, each with a few numbers of a panel, would be visited for every part.
constexpr Int kLongRow = 1024;
inline bool keeps_panels(bool transposed, Int columns, Int depth) {
  return !transposed && columns >= kLongRow && depth > kDepth;
}

// Scratch of the products below, in floats.
inline Int weight_floats(bool transposed, Int n, Int columns, Int depth) {
  return (n + kWide) * kDepth + (keeps_panels(transposed, columns, depth) ? n * kLongRow : 0);
}
constexpr Int kGradientFloats = kStrip * block_depth(kDepth) + kWide * kDepth;

// C (n, columns) = A B: fill(r, k, some, to) writes `some` numbers of A's row r from the k-th on, and a weight holds B,
// (depth, columns), or its transpose.
template <class Fill, class T>
void multiply_weight(bool transposed, Int n, Int columns, Int depth, const Fill& fill, const T* weight, float* c,
                     float* scratch) {
  float* left = scratch;
  float* panels = scratch + n * kDepth;
  float* sums = keeps_panels(transposed, columns, depth) ? panels + kWide * kDepth : nullptr;
  const Int step = transposed ? kPanel : kWide, part = sums ? kLongRow : columns;
  for (Int first = 0; first < columns; first += part) {
    const Int last = std::min(first + part, columns);
    for (Int k = 0; k < depth; k += kDepth) {
      const Int some = std::min(kDepth, depth - k);
      for (Int r = 0; r < n; ++r) fill(r, k, some, left + r * some);
      for (Int j = first; j < last; j += step) {
        const Int wide = std::min(step, last - j);
        if (transposed)
          pack_columns([=](Int i) { return weight + (j + i) * depth + k; }, wide, some, panels);
        else
          pack_rows([=](Int i) { return weight + (k + i) * columns + j; }, some, wide, panels);
        for (Int q = 0; q < wide; q += kPanel)
          multiply_panel<Left::kRows>(sum_from(k), n, std::min(kPanel, wide - q), some, left, some, left,
                                      panels + q * some, sums ? sums + (j - first + q) * n : c + j + q,
                                      sums ? kPanel : columns);
      }
    }
    for (Int r = 0; sums && r < n; ++r)
      for (Int j = first; j < last; j += kPanel)
        convert(sums + (j - first) * n + r * kPanel, c + r * columns + j, std::min(kPanel, last - j));
  }
}

// C (m, columns) = A B for a weight A (m, depth) that is read as it lies, and B in panels. C is in whole panels, too.
template <class T>
void multiply_columns(Int m, Int columns, Int depth, const T* weight, const float* panels, float* c) {
  for (Int k = 0; k < depth; k += kLongDepth) {
    const Int some = std::min(kLongDepth, depth - k);
    for (Int i = 0; i < m; i += kTileRows) {
      const Int rows = std::min(kTileRows, m - i);
      const T* block = weight + i * depth + k;
      float wide[std::is_same_v<T, float> ? 1 : kTileRows * kLongDepth];
      const float* left;
      const float* next;
      Int row = depth;
      if constexpr (std::is_same_v<T, float>) {
        left = block, next = i + 2 * kTileRows <= m ? block + kTileRows * depth : block;
      } else {
        for (Int r = 0; r < rows; ++r) convert(block + r * depth, wide + r * kLongDepth, some);
        left = next = wide, row = kLongDepth;
      }
      for (Int j = 0; j < columns; j += kPanel)
        multiply_panel<Left::kRows>(sum_from(k), rows, std::min(kPanel, columns - j), some, left, row, next,
                                    panels + j * depth + k * kPanel, c + j * m + i * kPanel, kPanel);
    }
  }
}

// C (m, columns) = Aᵀ B for rows left(0) … left(depth - 1) of A and right(0) … of B; past the caches if C is part of
// something `large`, the sum has one part and C's rows are whole cache lines.
template <class LeftAt, class RightAt>
void multiply_transposed(bool large, Int m, Int columns, Int depth, const LeftAt& left, const RightAt& right, float* c,
                         Int c_row, float* scratch) {
  const bool whole_lines = (reinterpret_cast<std::uintptr_t>(c) | std::uintptr_t(c_row * sizeof(float))) % kLine == 0;
  const bool streams = large && depth <= kDepth && whole_lines;
  float* blocks = scratch;
  float* panels = scratch + kStrip * block_depth(kDepth);
  decltype(left(0)) left_rows[kDepth];
  decltype(right(0)) right_rows[kDepth];
  for (Int k = 0; k < depth; k += kDepth) {
    const Int some = std::min(kDepth, depth - k);
    for (Int r = 0; r < some; ++r) left_rows[r] = left(k + r), right_rows[r] = right(k + r);
    for (Int j = 0; j < columns; j += kWide) {
      const Int wide = std::min(kWide, columns - j);
      pack_rows([&](Int r) { return right_rows[r] + j; }, some, wide, panels);
      for (Int i = 0; i < m; i += kStrip) {
        const Int rows = std::min(kStrip, m - i);
        pack_blocks([&](Int r) { return left_rows[r] + i; }, some, rows, blocks);
        for (Int q = 0; q < wide; q += kPanel)
          multiply_panel<Left::kBlocks>(streams ? Into::kStream : sum_from(k), rows, std::min(kPanel, wide - q), some,
                                        blocks, block_depth(some), blocks, panels + q * some, c + i * c_row + j + q,
                                        c_row);
      }
    }
  }
  if (streams) finish_streams();
}

}  // namespace himoe
