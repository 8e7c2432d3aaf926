// Work over several threads: torch's own pool, past which small work goes straight.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace constrained_ops {

// How many threads share work, where one is not worth waking for less than `grain`.
inline int64_t threads_for(int64_t count, int64_t grain) {
  if (count <= grain) return 1;
  return std::min<int64_t>((count + grain - 1) / grain, torch::stable::get_num_threads());
}

// A share of the work for each of n threads: share i goes from start_of(i, n) to start_of(i + 1, n), and is done
// `piece` by piece. Who is through with his own takes pieces of another's, since threads are never equally fast: other
// processes run, too, and rows differ. Where pieces begin does not depend on who takes them.
template <typename StartOf, typename Body>
void share_out(int64_t n, const StartOf& start_of, int64_t piece, const Body& body) {
  if (n == 1) return body(start_of(0, 1), start_of(1, 1));
  struct alignas(64) Share {  // a line of cache each
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(n);
  for (int64_t i = 0; i < n; ++i) shares[i].next = start_of(i, n), shares[i].end = start_of(i + 1, n);
  torch::stable::parallel_for(0, n, 1, [&](int64_t mine, int64_t) {
    for (int64_t i = 0; i < n; ++i) {
      Share& share = shares[(mine + i) % n];
      if (i > 0 && share.next.load(std::memory_order_relaxed) >= share.end) continue;  // cheaper to look than to take
      for (int64_t from; (from = share.next.fetch_add(piece, std::memory_order_relaxed)) < share.end;)
        body(from, std::min(from + piece, share.end));
    }
  });
}

// body(begin, end) over all of [0, count), so many grains at a time.
template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body, int64_t grains_at_once = 4) {
  const auto start_of = [count](int64_t share, int64_t of) { return count * share / of; };
  share_out(threads_for(count, grain), start_of, grains_at_once * grain, body);
}

}  // namespace constrained_ops
