// The expert MLP on a CPU: tasks over (expert, row tile) and over blocks of the weight gradients, serial inside.
//
// native.py compiles this file and passes it plain pointers. Every number is summed in one order, wherever a tile or a
// block ends and whoever takes it, so results are the same bits for any number of threads (torch's bf16 products are
// always cut alike instead). There is no barrier inside a pass: a block of a weight gradient waits for its own expert's
// row tiles, which stand further ahead in the one list of tasks.

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "layer.h"
#include "sort.h"

namespace himoe {
namespace {

// Runs body(thread) on every thread.
template <class Body>
void on_threads(const Problem& p, const Body& body) {
#ifdef _OPENMP
  if (p.threads > 1) {
#pragma omp parallel num_threads(int(p.threads))
    body(omp_get_thread_num());
    return;
  }
#endif
  body(0);
}

// Returns whether all went well: nothing that is thrown may leave a parallel region, nor reach Python.
template <class S, class C>
bool run(const Problem& p, bool backward) {
  const Layer<S, C> layer{p};
  const std::vector<Task> tasks = list_tasks(p, backward);
  const Int scratch_size = scratch_floats(p, tasks), pairs = p.tokens * p.top_k, kept = kept_rows(p);
  std::vector<std::atomic<Int>> tiles_left(p.experts), gradients_left(p.experts);
  for (Int e = 0; e < p.experts; ++e) tiles_left[e] = gradients_left[e] = 0;
  for (const Task& t : tasks) (is_tile(t) ? tiles_left : gradients_left)[t.expert]++;
  std::atomic<Int> next_task{0}, tasks_left{Int(tasks.size())}, next_token{0}, finished{0};
  std::atomic<bool> failed{false};
  const auto wait_for = [](const std::atomic<Int>& left) {
    while (left > 0) std::this_thread::yield();
  };
  const auto body = [&](Int thread) {
    const int omp_threads = p.omp_threads ? p.omp_threads() : 0;  // torch's; asked the first time, it sets both
    const int blas_threads = p.set_blas_threads ? p.set_blas_threads(1) : 0;
    if (p.set_omp_threads) p.set_omp_threads(1);
    const Scratch scratch{p.scratch + thread * scratch_size};
    for (Int i; (i = next_task++) < Int(tasks.size()); --tasks_left) {
      const Task& t = tasks[i];
      if (is_tile(t)) {
        for (Int e = finished; e < t.after; finished = ++e) wait_for(gradients_left[e]);
      } else {
        wait_for(tiles_left[t.expert]);
      }
      try {
        layer.run_task(t, scratch);
      } catch (...) {  // torch's products; those who wait for this task go on
        failed = true;
      }
      --(is_tile(t) ? tiles_left : gradients_left)[t.expert];
    }
    wait_for(tasks_left);
    constexpr Int some = 32;
    for (Int t; p.y && (t = next_token.fetch_add(some)) < p.tokens;)
      for (Int token = t; token < std::min(t + some, p.tokens); ++token) layer.combine(token, scratch.at);
    if (p.set_omp_threads) p.set_omp_threads(omp_threads);
    if (p.set_blas_threads) p.set_blas_threads(blas_threads);
  };
  if (!tasks.empty() || p.tokens > 0) on_threads(p, body);
  for (Int pair = 0; p.d_weights && pair < pairs; ++pair)
    p.d_weights[pair] = p.row_of_pair[pair] < kept ? p.d_weight_of_row[p.row_of_pair[pair]] : 0;
  return !failed;
}

}  // namespace
}  // namespace himoe

extern "C" {

// 0, 1 where a pair's expert is not there, or -1 where memory ran out.
himoe::Int himoe_sort(himoe::Int pairs, himoe::Int experts, const himoe::Int* ids, const bool* kept,
                      himoe::Int* pair_of_row, himoe::Int* row_of_pair, std::int32_t* offsets) {
  try {
    return himoe::sort_by_expert(pairs, experts, ids, kept, pair_of_row, row_of_pair, offsets) ? 0 : 1;
  } catch (...) {
    return -1;
  }
}

// Floats of scratch that one thread needs; -1: no memory for the list of tasks.
himoe::Int himoe_scratch(const himoe::Problem* p, himoe::Int backward) {
  try {
    return himoe::scratch_floats(*p, himoe::list_tasks(*p, backward));
  } catch (...) {
    return -1;
  }
}

// 0, or -1 where memory ran out or a product failed.
himoe::Int himoe_run(const himoe::Problem* p, himoe::Int backward) {
  using namespace himoe;
  try {
    const auto pass = p->mode == kSingle ? run<float, float> : p->mode == kWidened ? run<bf16, float> : run<bf16, bf16>;
    return pass(*p, backward) ? 0 : -1;
  } catch (...) {
    return -1;
  }
}
}
