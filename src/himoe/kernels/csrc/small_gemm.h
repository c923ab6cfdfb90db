// Products for experts with few rows, where BLAS spends more time on packing weights than on multiplying them.
//
// Weights are read once, row by row as they lie: forward broadcasts their numbers against a panel of tokens, which were
// copied anyway; backward copies some rows at a time to panels in the L2 cache. One microkernel, in the vector
// extensions of GCC and Clang: 6 rows of C by two vectors stay in registers. It reaches nine tenths of the processor's
// rate. With 16 rows an expert the bound is traffic: of an fp32 weight 4 bytes are read in forward, 4 in backward, and 4
// written, for 6 flops a row. Measured on an EPYC with AVX2 against MKL, one thread, D 512, F 64: 1.1 to 1.4 times as fast
// up to 32 rows, up to 1.1 at 64, no faster at 128.

#pragma once

#include <algorithm>

#include "problem.h"

namespace himoe {

#if defined(__AVX512F__)
constexpr Int kLanes = 16;
#elif defined(__AVX__)
constexpr Int kLanes = 8;
#else
constexpr Int kLanes = 4;
#endif
constexpr Int kPanel = 2 * kLanes;  // columns of a panel: two vectors
constexpr Int kTileRows = 6;        // 12 sums, two vectors of B and a broadcast fit 16 registers
constexpr Int kDepth = 256;         // of a product at a time: a panel of it is half of an L1 cache with AVX2

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using LooseVec = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
using Four = float __attribute__((vector_size(16), aligned(alignof(float)), may_alias));

// C (R, V vectors) = A B, or C + A B. A's steps along rows and along the sum are any.
template <int R, int V>
inline __attribute__((always_inline)) void multiply_tile(bool add, Int depth, const float* a, Int a_row, Int a_step,
                                                         const float* b, float* c, Int c_row) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = add ? Vec(*reinterpret_cast<const LooseVec*>(c + r * c_row + v * kLanes)) : Vec{};
#pragma GCC unroll 4
  for (Int i = 0; i < depth; ++i, a += a_step, b += kPanel) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = *reinterpret_cast<const Vec*>(b + v * kLanes);
#if defined(__AVX__)
    for (int v = 0; v < V; ++v) asm("" : "+x"(right[v]));  // or GCC reads it from memory for every row
#endif
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += right[v] * a[r * a_row];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<LooseVec*>(c + r * c_row + v * kLanes) = sum[r][v];
}

template <int R, int V>
void multiply_rows(bool add, Int m, Int depth, const float* a, Int a_row, Int a_step, const float* b, float* c,
                   Int c_row) {
  for (; m >= R; m -= R, a += R * a_row, c += R * c_row) multiply_tile<R, V>(add, depth, a, a_row, a_step, b, c, c_row);
  if constexpr (R > 1)
    if (m > 0) multiply_rows<R - 1, V>(add, m, depth, a, a_row, a_step, b, c, c_row);
}

// C (m, columns) = A panel, or C + A panel. Columns that are no whole vectors take a way through the stack.
inline void multiply_panel(bool add, Int m, Int columns, Int depth, const float* a, Int a_row, Int a_step,
                           const float* panel, float* c, Int c_row) {
  if (columns == kPanel) return multiply_rows<kTileRows, 2>(add, m, depth, a, a_row, a_step, panel, c, c_row);
  if (columns == kLanes) return multiply_rows<kTileRows, 1>(add, m, depth, a, a_row, a_step, panel, c, c_row);
  for (; m > 0; m -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row) {
    alignas(64) float tile[kTileRows * kPanel];
    const Int rows = std::min(m, kTileRows);
    multiply_rows<kTileRows, 2>(false, rows, depth, a, a_row, a_step, panel, tile, kPanel);
    for (Int r = 0; r < rows; ++r)
      for (Int j = 0; j < columns; ++j) c[r * c_row + j] = tile[r * kPanel + j] + (add ? c[r * c_row + j] : 0);
  }
}

// C (m, columns) = A B, or C + A B, for B (depth, columns) in panels: all rows of kPanel columns, then those of the next. C's
// panels lie c_panel apart. Rows of A go by once, each block of them meeting all panels. A of bf16 has a_step 1.
template <class T>
void multiply_panels(bool add, Int m, Int columns, Int depth, const T* a, Int a_row, Int a_step, const float* panels, float* c,
                     Int c_row, Int c_panel) {
  for (Int k = 0; k < depth; k += kDepth) {
    const Int some = std::min(kDepth, depth - k);
    for (Int i = 0; i < m; i += kTileRows) {
      const Int rows = std::min(kTileRows, m - i);
      const T* block = a + i * a_row + k * a_step;
      float wide[std::is_same_v<T, float> ? 1 : kTileRows * kDepth];
      const float* left;
      Int row = a_row;
      if constexpr (std::is_same_v<T, float>) {
        left = block;
      } else {
        for (Int r = 0; r < rows; ++r) convert(block + r * a_row, wide + r * kDepth, some);
        left = wide, row = kDepth;
      }
      for (Int j = 0; j < columns; j += kPanel)
        multiply_panel(add || k > 0, rows, std::min(kPanel, columns - j), some, left, row, a_step,
                       panels + j * depth + k * kPanel, c + i * c_row + j / kPanel * c_panel, c_row);
    }
  }
}

// Row number `row` of `rows` into panels, see multiply_panels.
template <class T>
void pack_row(const T* from, Int columns, Int rows, Int row, float* panels) {
  float* to = panels + row * kPanel;
  Int j = 0;
  for (; j + kPanel <= columns; j += kPanel, to += rows * kPanel) convert(from + j, to, kPanel);
  if (j == columns) return;
  convert(from + j, to, columns - j);
  std::fill(to + columns - j, to + kPanel, 0.0f);
}

// C (m, columns) = A B for few rows m of A and a weight B (depth, columns), which is read as it lies in memory, a
// block at a time into panels that stay in the L2 cache.
template <class T>
void multiply_weight(Int m, Int columns, Int depth, const float* a, Int a_row, const T* b, float* c) {
  constexpr Int area = 1 << 15;
  alignas(64) float panels[area];
  for (Int j = 0; j < columns; j += area / 16) {
    const Int width = std::min(columns - j, area / 16), most = std::min(area / round_up(width, kPanel), kDepth);
    for (Int k = 0; k < depth; k += most) {
      const Int some = std::min(most, depth - k);
      for (Int r = 0; r < some; ++r) pack_row(b + (k + r) * columns + j, width, some, r, panels);
      multiply_panels(k > 0, m, width, some, a + k, a_row, 1, panels, c + j, columns, kPanel);
    }
  }
}

// Rows (n, width) that at(r) points to, into panels of their transpose; columns beyond n are 0.
template <class At>
void transpose_in(const At& at, Int n, Int width, float* panels) {
  for (Int r = 0; r < round_up(n, kLanes); r += 4) {
    float* to = panels + r / kPanel * kPanel * width + r % kPanel;
    if (r + 4 <= n) {
      const auto *a = at(r), *b = at(r + 1), *c = at(r + 2), *d = at(r + 3);
      for (Int k = 0; k < width; ++k)
        *reinterpret_cast<Four*>(to + k * kPanel) = Four{load(a + k), load(b + k), load(c + k), load(d + k)};
    } else {
      for (Int i = 0; i < 4; ++i)
        if (r + i < n)
          for (Int k = 0; k < width; ++k) to[k * kPanel + i] = load(at(r + i) + k);
        else
          for (Int k = 0; k < width; ++k) to[k * kPanel + i] = 0;
    }
  }
}

// The way back: to (n, width) from panels of its transpose.
template <class T>
void transpose_out(const float* panels, Int n, Int width, T* to) {
  for (Int r = 0; r < n; ++r, to += width) {
    const float* from = panels + r / kPanel * kPanel * width + r % kPanel;
    Int k = 0;
    if constexpr (std::is_same_v<T, float>)
      for (; k + 4 <= width; k += 4, from += 4 * kPanel)
        *reinterpret_cast<Four*>(to + k) = Four{from[0], from[kPanel], from[2 * kPanel], from[3 * kPanel]};
    for (; k < width; ++k, from += kPanel) store(to + k, *from);
  }
}

}  // namespace himoe
