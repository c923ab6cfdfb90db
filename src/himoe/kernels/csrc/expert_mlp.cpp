// The expert MLP on a CPU: tasks over (expert, row tile) and over blocks of the weight gradients, serial products inside.
//
// native.py compiles this file and passes it plain pointers; the products are the BLAS of the loaded torch. What a task
// computes depends on shapes and counts alone, not on the number of threads or on who takes it, so results are the same
// bits for any number of threads. There is no barrier inside a pass: a block of a weight gradient waits for its own
// expert's row tiles, which stand further ahead in the one list of tasks.
//
// S is the type of tensors in memory, C that of a product's operands: (float, float); (bf16, float) where the machine
// has no bf16 products, operands being widened a tile at a time; (bf16, bf16) where it has.

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "problem.h"

namespace himoe {
namespace {

constexpr Int kGradRows = 512;         // rows summed by one product of a weight gradient
constexpr Int kWidenedArea = 1 << 18;  // elements of a weight, or of its gradient, kept in fp32 at a time

enum Kind { kForwardTile, kBackwardTile, kUpGrad, kDownGrad, kZeroGrad };

struct Task {
  Kind kind;
  Int expert, row0, row1;              // sorted rows
  Int shift = 0;                       // sorted row + shift: its row in unit and d_hidden
  Int after = 0;                       // a backward tile waits for the gradients of all experts before this one
  Int i0 = 0, i1 = 0, j0 = 0, j1 = 0;  // block of the expert's weight gradient
};

bool is_tile(const Task& t) { return t.kind == kForwardTile || t.kind == kBackwardTile; }

Int round_up(Int a, Int b) { return (a + b - 1) / b * b; }

Int kept_rows(const Problem& p) { return p.offsets[p.experts - 1]; }

// Enough tiles to keep threads busy, each with enough rows to pay for reading the expert's weights.
Int rows_per_tile(const Problem& p) {
  return std::clamp<Int>(round_up(kept_rows(p) / 16, 16), 32, p.mode == kWidened ? 384 : 192);
}

struct Block {
  Int rows, columns;
};

// Blocks of an (n, m) weight gradient summed over `rows` rows. None is more than about 1/32 of the work on all experts,
// so one huge expert keeps every thread busy; bf16 ones fit the scratch in which they are summed in fp32. The longer
// side is cut: narrow products are slow.
Block gradient_block(const Problem& p, Int n, Int m, Int rows) {
  Int area = std::max<Int>(64 * 64, kept_rows(p) * n * m / (32 * std::max<Int>(rows, 1)));
  if (p.mode != kSingle) area = std::min(area, kWidenedArea);
  while (n * m > area && std::max(n, m) > 64) {
    Int& longer = n >= m ? n : m;
    longer = round_up((longer + 1) / 2, 16);
  }
  return {n, m};
}

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
void gemm(const Problem& p, bool ta, bool tb, Int m, Int n, Int k, const float* a, Int lda, const float* b, Int ldb,
          float beta, float* c, Int ldc) {
  const int mi = int(m), ni = int(n), ki = int(k), ldai = int(lda), ldbi = int(ldb), ldci = int(ldc);
  const float one = 1;
  // BLAS is column-major: it computes Cᵀ = op(B)ᵀ op(A)ᵀ from the same memory.
  p.single_gemm(tb ? "T" : "N", ta ? "T" : "N", &ni, &mi, &ki, &one, b, &ldbi, a, &ldai, &beta, c, &ldci);
}

void gemm(const Problem& p, bool ta, bool tb, Int m, Int n, Int k, const bf16* a, Int lda, const bf16* b, Int ldb,
          float, bf16* c, Int ldc) {
  p.half_gemm(ta, tb, m, n, k, a, lda, b, ldb, c, ldc);
}

template <class S, class C>
struct Layer {
  static constexpr bool kConverts = !std::is_same_v<S, C>;
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

  void forward_tile(const Task& t, Scratch scratch) const {
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
    C* right_space = scratch.take<C>(most * J);
    float* sum = in_place ? nullptr : scratch.take<float>(I * J);
    C* part = std::is_same_v<C, float> ? reinterpret_cast<C*>(sum) : scratch.take<C>(I * J);
    if (in_place) part = reinterpret_cast<C*>(block);
    for (Int r = t.row0; r < t.row1; r += kGradRows) {
      const Int end = std::min(r + kGradRows, t.row1);
      Int left_ld, right_ld;
      const C* left = of_up ? operand(d_hidden + t.shift * p.rows_up, false, p.rows_up, r, end, t.i0, t.i1, left_space, left_ld)
                            : operand(grad, true, p.width, r, end, t.i0, t.i1, left_space, left_ld);
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

void add_blocks(const Problem& p, Task task, Kind kind, Int n, Int m, std::vector<Task>& tasks) {
  const Block block = gradient_block(p, n, m, task.row1 - task.row0);
  task.kind = kind;
  for (task.i0 = 0; task.i0 < n; task.i0 += block.rows)
    for (task.j0 = 0; task.j0 < m; task.j0 += block.columns) {
      task.i1 = std::min(task.i0 + block.rows, n), task.j1 = std::min(task.j0 + block.columns, m);
      tasks.push_back(task);
    }
}

// Each expert's rows, and where they stand in unit and d_hidden: groups of experts take the two halves in turn, and a
// group's first tile waits for the group before the last.
std::vector<Task> place_experts(const Problem& p) {
  std::vector<Task> experts;
  Int start = 0, group = 0, last_group = 0, half = 0;  // of the group: its first row, its first expert, the last one's
  for (Int e = 0; e < p.experts; ++e) {
    const Int row0 = e ? p.offsets[e - 1] : 0, row1 = p.offsets[e];
    if (row1 - start > p.group_rows) start = row0, last_group = group, group = e, half = p.group_rows - half;
    experts.push_back({kZeroGrad, e, row0, row1, half - start, last_group});
  }
  return experts;
}

// All tasks in the order in which threads take them. An expert's weight gradients come a little later than its row
// tiles: late enough that those are done, early enough that what they wrote is still in the cache.
std::vector<Task> list_tasks(const Problem& p, bool backward) {
  std::vector<Task> tasks;
  const std::vector<Task> experts = place_experts(p);
  const Int most = rows_per_tile(p);
  std::vector<Int> tiles_before(p.experts + 1, 0);
  const auto add_gradients = [&](const Task& expert) {
    if (expert.row0 == expert.row1) return tasks.push_back(expert);
    if (p.need_up) add_blocks(p, expert, kUpGrad, p.rows_up, p.width, tasks);
    if (p.need_down) add_blocks(p, expert, kDownGrad, p.width, p.units, tasks);
  };
  Int next = 0;  // the first expert whose gradients are not listed
  for (Int e = 0; e < p.experts; ++e) {
    Task tile = experts[e];
    const Int row0 = tile.row0, end = tile.row1, rows = end - row0;
    const Int tiles = (rows + most - 1) / most, each = tiles ? round_up((rows + tiles - 1) / tiles, 8) : 0;
    while (backward && next < tile.after) add_gradients(experts[next++]);
    tile.kind = backward ? kBackwardTile : kForwardTile;
    for (Int r = row0; r < end; r += each) {
      tile.row0 = r, tile.row1 = std::min(r + each, end);
      tasks.push_back(tile);
    }
    tiles_before[e + 1] = tiles_before[e] + tiles;
    while (backward && next < e && tiles_before[e + 1] - tiles_before[next + 1] >= p.threads)
      add_gradients(experts[next++]);
  }
  while (backward && next < p.experts) add_gradients(experts[next++]);
  return tasks;
}

Int scratch_floats(const Problem& p, const std::vector<Task>& tasks) {
  const Int D = p.width, H = p.rows_up, F = p.units;
  const Int wide = p.mode == kWidened ? kWidenedArea + std::max(D, F) : 0;
  Int most = D;
  for (const Task& t : tasks) {
    const Int I = t.i1 - t.i0, J = t.j1 - t.j0, n = t.row1 - t.row0;
    const bool block = t.kind == kUpGrad || t.kind == kDownGrad;
    if (t.kind != kZeroGrad)
      most = std::max(most, block ? std::min(kGradRows, n) * (I + J) + (p.mode == kSingle ? 0 : 2 * I * J) : n * (D + H + F) + F + wide);
  }
  return round_up(most + 128, 16);  // each piece begins on a cache line
}

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

template <class S, class C>
void run(const Problem& p, bool backward) {
  const Layer<S, C> layer{p};
  const std::vector<Task> tasks = list_tasks(p, backward);
  const Int scratch_size = scratch_floats(p, tasks), pairs = p.tokens * p.top_k, kept = kept_rows(p);
  std::vector<std::atomic<Int>> tiles_left(p.experts), gradients_left(p.experts);
  for (Int e = 0; e < p.experts; ++e) tiles_left[e] = gradients_left[e] = 0;
  for (const Task& t : tasks) (is_tile(t) ? tiles_left : gradients_left)[t.expert]++;
  std::atomic<Int> next_task{0}, tasks_left{Int(tasks.size())}, next_token{0}, finished{0};
  const auto wait_for = [](const std::atomic<Int>& left) {
    while (left > 0) std::this_thread::yield();
  };
  const auto body = [&](Int thread) {
    const int blas_threads = p.set_blas_threads ? p.set_blas_threads(1) : 0;
    const Scratch scratch{p.scratch + thread * scratch_size};
    for (Int i; (i = next_task++) < Int(tasks.size()); --tasks_left) {
      const Task& t = tasks[i];
      if (is_tile(t)) {
        for (Int e = finished; e < t.after; finished = ++e) wait_for(gradients_left[e]);
      } else {
        wait_for(tiles_left[t.expert]);
      }
      layer.run_task(t, scratch);
      --(is_tile(t) ? tiles_left : gradients_left)[t.expert];
    }
    wait_for(tasks_left);
    constexpr Int some = 32;
    for (Int t; p.y && (t = next_token.fetch_add(some)) < p.tokens;)
      for (Int token = t; token < std::min(t + some, p.tokens); ++token) layer.combine(token, scratch.at);
    if (p.set_blas_threads) p.set_blas_threads(blas_threads);
  };
  if (!tasks.empty() || p.tokens > 0) on_threads(p, body);
  for (Int pair = 0; p.d_weights && pair < pairs; ++pair)
    p.d_weights[pair] = p.row_of_pair[pair] < kept ? p.d_weight_of_row[p.row_of_pair[pair]] : 0;
}

}  // namespace
}  // namespace himoe

extern "C" {

// Floats of scratch that one thread needs.
himoe::Int himoe_scratch(const himoe::Problem* p, himoe::Int backward) {
  return himoe::scratch_floats(*p, himoe::list_tasks(*p, backward));
}

void himoe_run(const himoe::Problem* p, himoe::Int backward) {
  using namespace himoe;
  if (p->mode == kSingle) return run<float, float>(*p, backward);
  if (p->mode == kWidened) return run<bf16, float>(*p, backward);
  run<bf16, bf16>(*p, backward);
}
}
