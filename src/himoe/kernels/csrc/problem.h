// What native.py hands to the kernel: one pass over one layer. The fields stand there in the same order.

#pragma once

#include "activation.h"

namespace himoe {

using HalfGemm = void(Int transpose_a, Int transpose_b, Int m, Int n, Int k, const void* a, Int lda, const void* b,
                      Int ldb, void* c, Int ldc);

inline Int round_up(Int a, Int b) { return (a + b - 1) / b * b; }

enum Mode : Int { kSingle, kWidened, kHalf };

struct Problem {
  Int top_k, width, rows_up, units, experts, tokens;  // K, D, H, F, E, T
  Int mode, activation, threads;
  Int need_x, need_weights, need_up, need_down;
  Int group_rows;  // unit and d_hidden hold two groups of experts of so many rows, or all T·K rows
  const Int *pair_of_row, *row_of_pair;  // (T·K,)
  const std::int32_t* offsets;           // (E,)
  const float* weights;                  // (T·K,)
  const void *x, *grad, *up, *down;      // (T, D), (T, D), (E, H, D), (E, D, F)
  void *hidden, *out, *y;                // (T·K, H); (T·K, D), working space; (T, D), the output or x's gradient
  void *unit, *d_hidden;                 // (·, F), (·, H): backward's working space, null where not needed
  float *d_weight_of_row, *d_weights;    // (T·K,) each
  void *d_up, *d_down;                   // as up and down, null where not needed
  float* scratch;                        // threads × himoe_scratch(problem) floats, on a cache line
  HalfGemm* half_gemm;
  // Of the calling thread, in the libraries of half_gemm's; null in other modes, or where they have none. It gets one:
  // products made for more have other bits, and in a forked child would wait for threads that it has not.
  int (*set_blas_threads)(int);
  int (*omp_threads)();
  void (*set_omp_threads)(int);
};

}  // namespace himoe
