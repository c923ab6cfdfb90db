// What there is to do in a pass: tasks over (expert, row tile) and over blocks of the weight gradients, in one list.

#pragma once

#include <algorithm>
#include <vector>

#include "small_gemm.h"

namespace himoe {

constexpr Int kGradRows = 512;         // rows summed by one product of a weight gradient
constexpr Int kWidenedArea = 1 << 18;  // elements of a weight, or of its gradient, kept in fp32 at a time
constexpr Int kFewRows = 64;             // at most so many are multiplied by small_gemm.h: with more, BLAS is as fast
constexpr Int kCachedWeights = 1 << 20;  // numbers of one expert that stay in a cache from one tile to the next

enum Kind { kForwardTile, kBackwardTile, kUpGrad, kDownGrad, kZeroGrad };

struct Task {
  Kind kind;
  Int expert, row0, row1;              // sorted rows
  Int shift = 0;                       // sorted row + shift: its row in unit and d_hidden
  Int after = 0;                       // a backward tile waits for the gradients of all experts before this one
  Int i0 = 0, i1 = 0, j0 = 0, j1 = 0;  // block of the expert's weight gradient
};

inline bool is_few(Int rows) { return rows <= kFewRows; }

inline bool is_tile(const Task& t) { return t.kind == kForwardTile || t.kind == kBackwardTile; }

inline Int kept_rows(const Problem& p) { return p.offsets[p.experts - 1]; }

// Enough tiles to keep threads busy, each with enough rows to pay for reading the expert's weights. Weights too large
// for a cache come from memory for every tile: 12 % less CPU time with tiles of 128 rows than of 64 at D 7168, F 512.
inline Int rows_per_tile(const Problem& p) {
  const Int least = (p.rows_up + p.units) * p.width > kCachedWeights ? 128 : 32;
  return std::clamp<Int>(round_up(kept_rows(p) / 16, 16), least, p.mode == kWidened ? 384 : 192);
}

struct Block {
  Int rows, columns;
};

// Blocks of an (n, m) weight gradient summed over `rows` rows. None is more than about 1/32 of the work on all experts,
// so one huge expert keeps every thread busy; bf16 ones fit the scratch in which they are summed in fp32. The longer
// side is cut: narrow products are slow.
inline Block gradient_block(const Problem& p, Int n, Int m, Int rows) {
  Int area = std::max<Int>(64 * 64, kept_rows(p) * n * m / (32 * std::max<Int>(rows, 1)));
  if (p.mode != kSingle) area = std::min(area, kWidenedArea);
  while (n * m > area && std::max(n, m) > 64) {
    Int& longer = n >= m ? n : m;
    longer = round_up((longer + 1) / 2, 16);
  }
  return {n, m};
}

inline void add_blocks(const Problem& p, Task task, Kind kind, Int n, Int m, std::vector<Task>& tasks) {
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
inline std::vector<Task> place_experts(const Problem& p) {
  std::vector<Task> experts;
  experts.reserve(p.experts);
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
inline std::vector<Task> list_tasks(const Problem& p, bool backward) {
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

inline Int scratch_floats(const Problem& p, const std::vector<Task>& tasks) {
  const Int D = p.width, H = p.rows_up, F = p.units;
  const Int wide = p.mode == kWidened ? kWidenedArea + std::max(D, F) : 0;
  Int most = D;
  for (const Task& t : tasks) {
    const Int padding = is_few(t.row1 - t.row0) ? kPanel : 1;
    const Int I = t.i1 - t.i0, J = round_up(t.j1 - t.j0, padding), n = round_up(t.row1 - t.row0, padding);
    const bool block = t.kind == kUpGrad || t.kind == kDownGrad;
    const bool hidden_apart = padding > 1 || p.mode == kWidened || (t.kind == kBackwardTile && !p.d_hidden);
    if (t.kind != kZeroGrad)
      most = std::max(most, block ? std::min(kGradRows, n) * (I + J) + (p.mode == kSingle ? 0 : 2 * I * J)
                                  : n * (D + F + (hidden_apart ? H : 0)) + F + wide);
  }
  return round_up(most + 128, 16);  // each piece begins on a cache line
}

}  // namespace himoe
