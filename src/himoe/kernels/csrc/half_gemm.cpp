// bf16 products of the loaded torch, for machines with bf16 instructions: BLAS has no common name for them.
//
// A library of its own, compiled only where it is used, because torch's headers take the compiler several seconds.

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include <cstdint>

using Int = std::int64_t;

// Row-major C (m, n) = op(A) op(B); row lengths in elements.
extern "C" void himoe_half_gemm(Int transpose_a, Int transpose_b, Int m, Int n, Int k, const void* a, Int lda,
                                const void* b, Int ldb, void* c, Int ldc) {
  const c10::InferenceMode no_autograd;
  const auto matrix = [](const void* at, Int rows, Int columns, Int row, Int column) {
    return at::from_blob(const_cast<void*>(at), {rows, columns}, {row, column}, at::kBFloat16);
  };
  at::Tensor result = matrix(c, m, n, ldc, 1);
  at::mm_out(result, transpose_a ? matrix(a, m, k, 1, lda) : matrix(a, m, k, lda, 1),
             transpose_b ? matrix(b, k, n, 1, ldb) : matrix(b, k, n, ldb, 1));
}
