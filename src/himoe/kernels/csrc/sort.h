// The pairs in expert order, by counting; as sort_by_expert of functional/dispatch.py.

#pragma once

#include <vector>

#include "activation.h"

namespace himoe {

// Pairs of one expert keep their order; those that are not kept come last. Returns whether every pair's expert is
// there.
inline bool sort_by_expert(Int pairs, Int experts, const Int* ids, const bool* kept, Int* pair_of_row,
                           Int* row_of_pair, std::int32_t* offsets) {
  std::vector<Int> next(experts + 1);  // the row of each expert's next pair; before, how many it has
  for (Int pair = 0; pair < pairs; ++pair) {
    if (ids[pair] < 0 || ids[pair] >= experts) return false;
    ++next[kept[pair] ? ids[pair] : experts];
  }
  Int end = 0;
  for (Int e = 0; e < experts; ++e) {
    const Int start = end;
    offsets[e] = std::int32_t(end += next[e]);
    next[e] = start;
  }
  next[experts] = end;
  for (Int pair = 0; pair < pairs; ++pair) {
    const Int row = next[kept[pair] ? ids[pair] : experts]++;
    pair_of_row[row] = pair, row_of_pair[pair] = row;
  }
  return true;
}

}  // namespace himoe
