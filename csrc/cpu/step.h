// The plan of an optimizer's steps on the CPU, made once and run in every step, and what it tells the loops. No torch,
// no Python.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "../step.h"
#include "loops.h"

namespace constrained_ops {

// How a parameter whose constraint goes along rows is cut into blocks, which stay in a first-level cache while a step
// passes them several times, or in a second-level one: a few whole outer indices, or a few neighbouring rows.
struct StepBlocks {
  static constexpr int64_t elements = 1024, of_rows = 512, of_neighbours = 4096;
  // Of longer rows there are no copies, which would grow with the parameter and not fit a cache of the second level.
  static constexpr int64_t longest_copied = 1 << 17;

  int64_t outers = 1, lanes, per_outer = 1;  // of a block; blocks in an outer index
  int64_t count;

  // Rows that follow each other are as many as a power of two. Those shorter than `alone` fill whole tiles; of others
  // fewer than these do.
  explicit StepBlocks(const RowLayout& layout, int64_t alone = shortest_alone) : lanes(layout.inner) {
    const auto [outer, length, inner] = layout;
    const int64_t size = std::max<int64_t>(1, length * inner);
    if (size <= elements) {
      outers = elements / size;
      if (inner == 1) {
        const uint64_t tile = std::max<uint64_t>(RowUnits::lanes, std::bit_floor(static_cast<uint64_t>(outers)));
        const uint64_t rows = std::bit_ceil(static_cast<uint64_t>((of_rows + size - 1) / size));
        outers = static_cast<int64_t>(length < alone ? tile : rows);
      }
      count = (outer + outers - 1) / outers;
      return;
    }
    // A line of cache at least, unless that would be much memory.
    const int64_t line = 16 * length <= 32 * of_neighbours || length > longest_copied ? 16 : 1;
    lanes = std::min(inner, std::max(line, of_neighbours / length));
    per_outer = (inner + lanes - 1) / lanes;
    count = outer * per_outer;
  }
};

// Hyperparameters as the formulas want them, for one parameter in one step.
struct StepNumbers {
  Adam<double> adam;
  bool euclidean;
  bool past_caches;     // what is written and not read goes to memory without a place in them
  bool to_first_level;  // where little is computed, memory is asked for as in cache.h
};

class StepPlan {
 public:
  // `cache_bytes`: see cache.h.
  StepPlan(Dtype dtype, Dtype state, int64_t cache_bytes);

  void add(const StepSlot& slot);

  // One step of all slots, in the order in which they were added. `grads`: memory laid out as each slot's parameter.
  void run(const std::vector<const void*>& grads, const std::vector<StepOptions>& groups, double grad_scale);

  // The rest of a training step wants its share of the caches, too.
  bool past_caches() const { return bytes_ > cache_bytes_ / 2; }
  size_t size() const { return slots_.size(); }
  size_t groups() const { return groups_; }  // how many there must be at the least

 private:
  // A span of a slot, in the units of StepLoop; spans do not depend on the number of threads.
  struct Task {
    uint32_t slot;
    int64_t begin, end;
  };

  void prepare(const std::vector<StepOptions>& groups, double grad_scale);

  StepLoop loop_;
  Dtype dtype_, state_;
  int64_t cache_bytes_, bytes_ = 0;  // that a step passes over
  size_t groups_ = 0;
  std::vector<StepSlot> slots_;
  std::vector<Task> tasks_;
  std::vector<int64_t> costs_{0};     // of all tasks before each
  std::vector<StepNumbers> numbers_;  // of this step, and which of them are each slot's
  std::vector<uint32_t> numbers_of_;
};

}  // namespace constrained_ops
