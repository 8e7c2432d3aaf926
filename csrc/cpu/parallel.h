// Work over several threads: torch's own pool, past which small work goes straight.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace constrained_ops {

template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain)
    body(int64_t(0), count);
  else
    torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace constrained_ops
