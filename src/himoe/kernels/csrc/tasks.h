// What there is to do in a pass: tasks over (expert, row tile) and over blocks of the weight gradients, in one list.

#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace himoe {

constexpr Int kHalfDepth = 512;    // rows summed by one bf16 product of a weight gradient
constexpr Int kSumArea = 1 << 18;  // numbers of a bf16 weight gradient summed in fp32 at a time
constexpr Int kFewRows = 48;       // so many rows at most become columns in forward, to read weights as they lie
constexpr Int kColumns = 1 << 21;  // numbers at most of a tile with more rows that becomes columns
constexpr Int kL2 = 1 << 21;       // bytes of an L2 cache, about; of larger weights other tiles become columns, too
constexpr Int kL3 = 1 << 25;       // bytes that are surely no longer in a core's caches when the optimizer reads them

constexpr Int kLeastRows = 96, kMostRows = 252;  // of a usual tile; kDepth numbers of the most are a quarter of a MiB

enum Kind { kForwardTile, kBackwardTile, kUpGrad, kDownGrad, kZeroGrad };

struct Task {
  Kind kind;
  Int expert, row0, row1;              // sorted rows
  Int shift = 0;                       // sorted row + shift: its row in unit and d_hidden
  Int after = 0;                       // a backward tile waits for the gradients of all experts before this one
  Int i0 = 0, i1 = 0, j0 = 0, j1 = 0;  // block of the expert's weight gradient
};

inline Int weight_bytes(const Problem& p) { return (p.rows_up + p.units) * p.width * Int(sizeof(float)); }

inline Int column_floats(const Problem& p, Int rows) {
  return round_up(rows, kPanel) * (p.width + p.rows_up) + rows * p.units;
}

// Whether forward takes a tile's rows as columns, which reads the weights as they lie, instead of packing weights.
inline bool takes_columns(const Problem& p, Int rows) {
  return rows <= kFewRows || (p.mode == kSingle && weight_bytes(p) > kL2 && column_floats(p, rows) <= kColumns);
}

inline bool is_tile(const Task& t) { return t.kind == kForwardTile || t.kind == kBackwardTile; }

inline Int kept_rows(const Problem& p) { return p.offsets[p.experts - 1]; }

// For how many threads at least work is cut. With torch's bf16 products it may change bits where a tile or a block
// ends; there it does not depend on the number of threads.
inline Int cut_for(const Problem& p) { return p.mode == kHalf ? 8 : std::max<Int>(8, p.threads); }

// Two tiles for every thread, each with enough rows to pay for packing the expert's weights.
inline Int rows_per_tile(const Problem& p) {
  return std::clamp(kept_rows(p) / (2 * cut_for(p)), kLeastRows, kMostRows);
}

struct Block {
  Int rows, columns;
};

// Blocks of an (n, m) weight gradient summed over `rows` rows. Few blocks pack less, but if they are not small, there
// are two for every thread among all experts, so that one huge expert keeps them all busy. In both bf16 modes they fit
// the scratch in which they are summed in fp32. The longer side is cut: narrow products are slow.
inline Block gradient_block(const Problem& p, Int n, Int m, Int rows) {
  Int area = std::max<Int>(64 * 64, kept_rows(p) * n * m / (2 * cut_for(p) * std::max<Int>(rows, 1)));
  if (p.mode != kSingle) area = std::min(area, kSumArea);
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

// All tasks in the order in which threads take them. Who takes one usually finds unfinished at most those just before
// it, one for every other thread: so many tasks stand, where there are enough, between an expert's row tiles and its
// weight gradients, and between those and a tile that takes their place in unit and d_hidden. Then waits are rare, and
// what was written is still in the cache.
inline std::vector<Task> list_tasks(const Problem& p, bool backward) {
  std::vector<Task> tasks;
  const std::vector<Task> experts = place_experts(p);
  const Int usual = rows_per_tile(p), others = p.threads - 1;
  std::vector<Int> tiles_end(p.experts), gradients_end(p.experts);  // in the list
  Int next = 0;  // the first expert whose gradients are not listed
  const auto size = [&] { return Int(tasks.size()); };
  const auto add_gradients = [&] {
    const Task& expert = experts[next];
    const bool any = expert.row0 < expert.row1;
    if (!any) tasks.push_back(expert);
    if (any && p.need_up) add_blocks(p, expert, kUpGrad, p.rows_up, p.width, tasks);
    if (any && p.need_down) add_blocks(p, expert, kDownGrad, p.width, p.units, tasks);
    gradients_end[next++] = size();
  };
  for (Int e = 0; e < p.experts; ++e) {
    Task tile = experts[e];
    const Int row0 = tile.row0, end = tile.row1, rows = end - row0;
    // Smaller tiles where most of an expert is in forward's last round, so that threads end together.
    const bool last = !backward && p.mode != kHalf && (row0 + end) / 2 >= kept_rows(p) - usual * p.threads;
    const Int here = last ? std::max(kLeastRows, usual / 2) : usual;
    const Int tiles = rows ? std::max<Int>(1, (rows + here / 2) / here) : 0;
    const Int each = tiles ? round_up((rows + tiles - 1) / tiles, kTileRows) : 0;
    const auto ready = [&] { return next < e && size() >= tiles_end[next] + others; };
    if (backward && tile.after > 0) {
      while (next < tile.after) add_gradients();
      while (ready() && size() < gradients_end[tile.after - 1] + others) add_gradients();
    }
    tile.kind = backward ? kBackwardTile : kForwardTile;
    for (Int r = row0; r < end; r += each) {
      tile.row0 = r, tile.row1 = std::min(r + each, end);
      tasks.push_back(tile);
    }
    tiles_end[e] = size();
    while (backward && ready()) add_gradients();
  }
  while (backward && next < p.experts) add_gradients();
  return tasks;
}

// What a thread needs for its largest task.
inline Int scratch_floats(const Problem& p, const std::vector<Task>& tasks) {
  const Int D = p.width, H = p.rows_up, F = p.units;
  const bool half = p.mode == kHalf, widened = p.mode == kWidened;
  Int most = D;
  for (const Task& t : tasks) {
    const Int n = t.row1 - t.row0, I = t.i1 - t.i0, J = t.j1 - t.j0;
    Int floats = 0;
    if (t.kind == kUpGrad || t.kind == kDownGrad) {
      floats = half ? std::min(kHalfDepth, n) * (I + J) + 2 * I * J : kGradientFloats + (widened ? I * J : 0);
    } else if (t.kind == kForwardTile && !half && takes_columns(p, n)) {
      floats = column_floats(p, n);
    } else if (is_tile(t)) {
      const bool forward = t.kind == kForwardTile;
      const Int of_weights = std::max(weight_floats(forward, n, F, D), weight_floats(forward, n, D, H));
      floats = (half ? n * std::max({D, H, F}) : of_weights) + (widened ? n * (D + H) : 0);
      if (t.kind == kBackwardTile) floats += (n + 1) * F + (widened || p.d_hidden ? 0 : n * H);
    }
    most = std::max(most, floats);
  }
  return round_up(most + 128, 16);  // each piece begins on a cache line
}

}  // namespace himoe
