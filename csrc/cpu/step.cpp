#include "step.h"

#include <algorithm>

#include "cache.h"
#include "levels.h"
#include "parallel.h"

namespace constrained_ops {
namespace {

constexpr int64_t elements_per_task = 16384, elements_in_rows_per_task = 4096;
constexpr int tasks_at_once = 4;

// In about nanoseconds, to share work out evenly: of a task, and of 16 elements.
constexpr int64_t task_cost = 60;
int64_t cost_of(StepKind kind) {
  if (kind == StepKind::simplex) return 64;
  if (kind == StepKind::softmax) return 32;
  return step_on_raw(kind) ? 24 : 6;
}
constexpr int64_t cost_per_thread = 20000;  // at least, so that waking another one pays

}  // namespace

StepPlan::StepPlan(Dtype dtype, Dtype state, int64_t cache_bytes)
    : loop_(loops().step(dtype, state)), dtype_(dtype), state_(state), cache_bytes_(cache_bytes) {}

void StepPlan::add(const StepSlot& slot) {
  const uint32_t index = static_cast<uint32_t>(slots_.size());
  slots_.push_back(slot);
  groups_ = std::max(groups_, static_cast<size_t>(slot.group) + 1);
  const int64_t of_compute = std::max(bytes_of(dtype_), bytes_of(Dtype::float32));
  const int64_t moments = slot.max_exp_avg_sq ? 3 : 2, raw = slot.raw ? of_compute : 0;
  bytes_ += slot.numel * (2 * bytes_of(dtype_) + moments * bytes_of(state_) + raw);
  const bool rows = step_along_rows(slot.kind);
  const int64_t units = slot.numel == 0 ? 0 : rows ? StepBlocks(slot.rows).count : slot.numel;
  const int64_t per_unit = rows ? slot.numel / std::max<int64_t>(1, units) : 1;
  const int64_t elements = rows ? elements_in_rows_per_task : elements_per_task;
  const int64_t per_task = std::max<int64_t>(1, elements / std::max<int64_t>(1, per_unit));
  for (int64_t begin = 0; begin < units; begin += per_task) {
    const int64_t end = std::min(units, begin + per_task);
    tasks_.push_back({index, begin, end});
    costs_.push_back(costs_.back() + task_cost + (end - begin) * per_unit * cost_of(slot.kind) / 16);
  }
}

// Counts the step, and computes what slots of one group and one count have in common.
void StepPlan::prepare(const std::vector<StepOptions>& groups, double grad_scale) {
  struct Last {
    bool known = false;
    float step;
    uint32_t index;
  };
  std::vector<Last> lasts(groups.size());
  numbers_.clear();
  numbers_of_.resize(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto& options = groups[slots_[i].group];
    auto& last = lasts[slots_[i].group];
    const float step = *slots_[i].step += 1;
    if (!last.known || step != last.step) {
      last = {true, step, static_cast<uint32_t>(numbers_.size())};
      numbers_.push_back({Adam<double>::at(options.adam, step, grad_scale), options.euclidean, past_caches(),
                          fetches_to_first_level()});
    }
    numbers_of_[i] = last.index;
  }
}

void StepPlan::run(const std::vector<const void*>& grads, const std::vector<StepOptions>& groups, double grad_scale) {
  prepare(groups, grad_scale);
  // The last ones first: the end of the gradients was written last and is still in the caches, and the beginning of
  // the parameters is when the next forward reads it. A few at a time, for a loop fetches ahead.
  const int64_t count = tasks_.size();
  const auto run_tasks = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const auto [slot, first_unit, last_unit] = tasks_[count - 1 - i];
      int64_t start = first_unit;
      for (++i; i < end && tasks_[count - 1 - i].slot == slot; ++i) start = tasks_[count - 1 - i].begin;
      loop_(slots_[slot], grads[slot], numbers_[numbers_of_[slot]], start, last_unit);
    }
  };
  // By cost and not by number: threads get equal shares of what may be one large tensor and thousands of tiny ones.
  const auto start_of = [&](int64_t share, int64_t of) {
    const int64_t cost_of_rest = costs_.back() * (of - share) / of;
    return count - (std::lower_bound(costs_.begin(), costs_.end() - 1, cost_of_rest) - costs_.begin());
  };
  share_out(threads_for(costs_.back(), cost_per_thread), start_of, tasks_at_once, run_tasks);
}

}  // namespace constrained_ops
