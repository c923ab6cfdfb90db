// Products on one thread, in fp32; operands that lie in memory as bf16 are widened where they are packed.
//
// A product is cut as BLIS does: kDepth numbers of every sum at a time, a panel of B (two vectors wide) in the L1
// cache, rows of A in the L2 cache. One microkernel, in the vector extensions of GCC and Clang, keeps 6 rows of C by
// two vectors in registers; from the L1 cache it reaches 98 % of an EPYC's rate. Why not BLAS: packing is one with what
// has to be done anyway (gathering tokens, activation, widening), and MKL is slow on processors that are not Intel's.

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
constexpr Int kDepth = 256;         // numbers of a sum at a time: with AVX2 a panel of them is half of an L1 cache
constexpr Int kWide = 256;          // columns of B packed at a time
constexpr Int kStrip = 96;          // columns of a transposed A packed at a time

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef float Eight __attribute__((vector_size(32), may_alias));
typedef std::uint32_t EightBits __attribute__((vector_size(32)));
// The same at any place. No alias declarations: Clang takes an alignment in those for one of their elements.
typedef float LooseVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
typedef float LooseEight __attribute__((vector_size(32), aligned(alignof(float)), may_alias));
typedef std::uint16_t EightHalves __attribute__((vector_size(16), aligned(alignof(bf16)), may_alias));

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

// How A lies: row after row, or in blocks of kTileRows rows, each transposed (pack_blocks); a_row is then the depth.
enum class Left { kRows, kBlocks };

template <Left left, int R, int V>
void multiply_rows(bool add, Int m, Int depth, const float* a, Int a_row, const float* b, float* c, Int c_row) {
  constexpr bool rows = left == Left::kRows;
  if constexpr (R == 1 && V == 1) {
    // As two rows, without GCC's knowing that they are one: of a single sum it makes no FMAs, which would round it
    // unlike the same row in company.
    Int none = 0;
    asm("" : "+r"(none));
    if (m > 0) multiply_tile<2, 1>(add, depth, a, none, rows ? 1 : kTileRows, b, c, none);
    return;
  }
  for (; m >= R; m -= R, a += R * a_row, c += R * c_row)
    multiply_tile<R, V>(add, depth, a, rows ? a_row : 1, rows ? 1 : kTileRows, b, c, c_row);
  if constexpr (R > 1)
    if (m > 0) multiply_rows<left, R - 1, V>(add, m, depth, a, a_row, b, c, c_row);
}

// C (m, columns) = A panel, or C + A panel. Columns that are no whole vectors take a way through the stack.
template <Left left>
void multiply_panel(bool add, Int m, Int columns, Int depth, const float* a, Int a_row, const float* panel, float* c,
                    Int c_row) {
  if (columns == kPanel) return multiply_rows<left, kTileRows, 2>(add, m, depth, a, a_row, panel, c, c_row);
  if (columns == kLanes) return multiply_rows<left, kTileRows, 1>(add, m, depth, a, a_row, panel, c, c_row);
  for (; m > 0; m -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row) {
    alignas(64) float tile[kTileRows * kPanel];
    const Int rows = std::min(m, kTileRows);
    for (Int r = 0; add && r < rows; ++r) convert(c + r * c_row, tile + r * kPanel, columns);
    multiply_rows<left, kTileRows, 2>(add, rows, depth, a, a_row, panel, tile, kPanel);
    for (Int r = 0; r < rows; ++r) convert(tile + r * kPanel, c + r * c_row, columns);
  }
}

inline Eight load_eight(const float* p) { return *reinterpret_cast<const LooseEight*>(p); }
inline Eight load_eight(const bf16* p) {
  const EightBits bits = __builtin_convertvector(*reinterpret_cast<const EightHalves*>(p), EightBits) << 16;
  Eight value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <int... I>
inline __attribute__((always_inline)) Eight shuffle(Eight a, Eight b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, EightBits{I...});
#endif
}

// The transpose of 8 vectors.
inline __attribute__((always_inline)) void transpose(Eight (&v)[8]) {
  Eight pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(v[i], v[i + 1]);
    pairs[i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(v[i], v[i + 1]);
  }
  for (int half = 0; half < 8; half += 4)
    for (int i = half; i < half + 2; ++i) {
      fours[2 * i - half] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(pairs[i], pairs[i + 2]);
      fours[2 * i - half + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(pairs[i], pairs[i + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(fours[i], fours[i + 4]);
    v[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(fours[i], fours[i + 4]);
  }
}

// Row number `row` of `rows` into panels: all rows of kPanel columns, then those of the next. What fills up the last
// one is multiplied but not stored; what lay there before could be slow numbers.
template <class T>
void pack_row(const T* from, Int columns, Int rows, Int row, float* panels) {
  float* to = panels + row * kPanel;
  Int j = 0;
  for (; j + kPanel <= columns; j += kPanel, to += rows * kPanel) convert(from + j, to, kPanel);
  if (j == columns) return;
  convert(from + j, to, columns - j);
  std::fill(to + columns - j, to + kPanel, 0.0f);
}

// Rows at(0) … at(n - 1) as columns of panels. A last panel is filled up with the last row.
template <class At>
void pack_columns(const At& at, Int n, Int width, float* panels) {
  for (Int r = 0; r < round_up(n, kPanel); r += 8) {
    decltype(at(r)) rows[8];
    for (Int i = 0; i < 8; ++i) rows[i] = at(std::min(r + i, n - 1));
    float* to = panels + r / kPanel * kPanel * width + r % kPanel;
    Int k = 0;
    for (; k + 8 <= width; k += 8) {
      Eight v[8];
      for (int i = 0; i < 8; ++i) v[i] = load_eight(rows[i] + k);
      transpose(v);
      for (int i = 0; i < 8; ++i, to += kPanel) *reinterpret_cast<Eight*>(to) = v[i];
    }
    for (; k < width; ++k, to += kPanel)
      for (int i = 0; i < 8; ++i) to[i] = load(rows[i] + k);
  }
}

// The way back: to (n, width) from columns of panels.
template <class T>
void unpack_columns(const float* panels, Int n, Int width, T* to) {
  for (Int r = 0; r < n; r += 8) {
    const float* from = panels + r / kPanel * kPanel * width + r % kPanel;
    const Int some = std::min<Int>(8, n - r);
    Int k = 0;
    for (; k + 8 <= width; k += 8) {
      Eight v[8];
      for (int i = 0; i < 8; ++i, from += kPanel) v[i] = *reinterpret_cast<const Eight*>(from);
      transpose(v);
      for (Int i = 0; i < some; ++i) convert(reinterpret_cast<const float*>(v + i), to + (r + i) * width + k, 8);
    }
    for (; k < width; ++k, from += kPanel)
      for (Int i = 0; i < some; ++i) store(to + (r + i) * width + k, from[i]);
  }
}

// Numbers 0 … m of rows at(0) … at(depth - 1) as blocks of the transpose.
template <class At>
void pack_blocks(const At& at, Int depth, Int m, float* to) {
  for (Int k = 0; k < depth; ++k, to += kTileRows) {
    const auto* from = at(k);
    Int i = 0;
    for (; i + kTileRows <= m; i += kTileRows) convert(from + i, to + i * depth, kTileRows);
    convert(from + i, to + i * depth, m - i);
  }
}

// Scratch of the products below, in floats.
inline Int weight_floats(Int n) { return (n + kWide) * kDepth; }
constexpr Int kGradientFloats = (kStrip + kWide) * kDepth;

// C (n, columns) = A B: fill(r, k, some, to) writes `some` numbers of A's row r from the k-th on, and a weight holds B,
// (depth, columns), or its transpose.
template <class Fill, class T>
void multiply_weight(bool transposed, Int n, Int columns, Int depth, const Fill& fill, const T* weight, float* c,
                     float* scratch) {
  float* left = scratch;
  float* panels = scratch + n * kDepth;
  const Int step = transposed ? kPanel : kWide;
  for (Int k = 0; k < depth; k += kDepth) {
    const Int some = std::min(kDepth, depth - k);
    for (Int r = 0; r < n; ++r) fill(r, k, some, left + r * some);
    for (Int j = 0; j < columns; j += step) {
      const Int wide = std::min(step, columns - j);
      if (transposed)
        pack_columns([=](Int i) { return weight + (j + i) * depth + k; }, wide, some, panels);
      else
        for (Int i = 0; i < some; ++i) pack_row(weight + (k + i) * columns + j, wide, some, i, panels);
      for (Int q = 0; q < wide; q += kPanel)
        multiply_panel<Left::kRows>(k > 0, n, std::min(kPanel, wide - q), some, left, some, panels + q * some,
                                    c + j + q, columns);
    }
  }
}

// C (m, columns) = A B for a weight A (m, depth) that is read as it lies, and B in panels. C is in whole panels, too.
template <class T>
void multiply_columns(Int m, Int columns, Int depth, const T* weight, const float* panels, float* c) {
  for (Int k = 0; k < depth; k += kDepth) {
    const Int some = std::min(kDepth, depth - k);
    for (Int i = 0; i < m; i += kTileRows) {
      const Int rows = std::min(kTileRows, m - i);
      const T* block = weight + i * depth + k;
      float wide[std::is_same_v<T, float> ? 1 : kTileRows * kDepth];
      const float* left;
      Int row = depth;
      if constexpr (std::is_same_v<T, float>) {
        left = block;
      } else {
        for (Int r = 0; r < rows; ++r) convert(block + r * depth, wide + r * kDepth, some);
        left = wide, row = kDepth;
      }
      for (Int j = 0; j < columns; j += kPanel)
        multiply_panel<Left::kRows>(k > 0, rows, std::min(kPanel, columns - j), some, left, row,
                                    panels + j * depth + k * kPanel, c + j * m + i * kPanel, kPanel);
    }
  }
}

// C (m, columns) = Aᵀ B for rows left(0) … left(depth - 1) of A and right(0) … of B.
template <class LeftAt, class RightAt>
void multiply_transposed(Int m, Int columns, Int depth, const LeftAt& left, const RightAt& right, float* c, Int c_row,
                         float* scratch) {
  float* blocks = scratch;
  float* panels = scratch + kStrip * kDepth;
  for (Int k = 0; k < depth; k += kDepth) {
    const Int some = std::min(kDepth, depth - k);
    for (Int j = 0; j < columns; j += kWide) {
      const Int wide = std::min(kWide, columns - j);
      for (Int r = 0; r < some; ++r) pack_row(right(k + r) + j, wide, some, r, panels);
      for (Int i = 0; i < m; i += kStrip) {
        const Int rows = std::min(kStrip, m - i);
        pack_blocks([&](Int r) { return left(k + r) + i; }, some, rows, blocks);
        for (Int q = 0; q < wide; q += kPanel)
          multiply_panel<Left::kBlocks>(k > 0, rows, std::min(kPanel, wide - q), some, blocks, some, panels + q * some,
                                        c + i * c_row + j + q, c_row);
      }
    }
  }
}

}  // namespace himoe
