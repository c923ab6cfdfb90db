// Operands of a product in the order in which the microkernel of gemm.h reads them: B in panels two vectors wide, a
// transposed A in blocks of as many rows as stay in registers. bf16 is widened on the way.

#pragma once

#include <algorithm>
#if defined(__AVX__)
#include <immintrin.h>
#endif

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

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef float Eight __attribute__((vector_size(32), may_alias));
typedef std::uint32_t EightBits __attribute__((vector_size(32)));
// The same at any place. No alias declarations: Clang takes an alignment in those for one of their elements.
typedef float LooseVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
typedef float LooseEight __attribute__((vector_size(32), aligned(alignof(float)), may_alias));
typedef std::uint16_t EightHalves __attribute__((vector_size(16), aligned(alignof(bf16)), may_alias));

inline Eight load_eight(const float* p) { return *reinterpret_cast<const LooseEight*>(p); }
inline Eight load_eight(const bf16* p) {
  const EightBits bits = __builtin_convertvector(*reinterpret_cast<const EightHalves*>(p), EightBits) << 16;
  Eight value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Writes a vector past the caches to where it is aligned: memory that is written anew as a whole need not be read
// before. For other threads it is there after finish_streams.
inline void stream(float* to, Vec value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, __m512(value));
#elif defined(__AVX__)
  _mm256_stream_ps(to, __m256(value));
#else
  *reinterpret_cast<Vec*>(to) = value;
#endif
}
inline void finish_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
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

// Rows lie apart in memory, where hardware does not fetch ahead from one to the next.
constexpr Int kRowsAhead = 8;
constexpr Int kLine = 64;  // bytes of a cache line

template <class T>
void prefetch(const T* from, Int n) {
  for (Int i = 0; i < n; i += kLine / Int(sizeof(T))) __builtin_prefetch(from + i);
}

// Rows at(0) … at(rows - 1) into panels, each as a row of kPanel numbers. A few panels at a time, whose lines stay in
// the L1 cache. What fills up the last panel is multiplied but not stored; what lay there before could be slow numbers.
template <class At>
void pack_rows(const At& at, Int rows, Int columns, float* panels) {
  constexpr Int kSome = 4 * kPanel;
  for (Int j = 0; j < columns; j += kSome) {
    const Int some = std::min(kSome, columns - j);
    for (Int r = 0; r < rows; ++r) {
      prefetch(at(std::min(r + kRowsAhead, rows - 1)) + j, some);
      const auto* from = at(r) + j;
      float* to = panels + j * rows + r * kPanel;
      Int i = 0;
      for (; i + kPanel <= some; i += kPanel, to += rows * kPanel) convert(from + i, to, kPanel);
      if (i == some) continue;
      convert(from + i, to, some - i);
      std::fill(to + some - i, to + kPanel, 0.0f);
    }
  }
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

// From one block of the transpose to the next, in numbers of a sum: a few more than it has, or all blocks would lie in
// the same few sets of the L1 cache.
constexpr Int block_depth(Int depth) { return depth + 8; }

// Numbers 0 … m of rows at(0) … at(depth - 1) as blocks of the transpose.
template <class At>
void pack_blocks(const At& at, Int depth, Int m, float* to) {
  const Int step = block_depth(depth);
  for (Int k = 0; k < depth; ++k, to += kTileRows) {
    prefetch(at(std::min(k + kRowsAhead, depth - 1)), m);
    const auto* from = at(k);
    Int i = 0;
    for (; i + kTileRows <= m; i += kTileRows) convert(from + i, to + i * step, kTileRows);
    convert(from + i, to + i * step, m - i);
  }
}

}  // namespace himoe
