// How much of what a step passes over the processor still has at hand in the next one.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace constrained_ops {

// Of the last level, in bytes; where the system does not tell, as many as is common.
inline int64_t cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE); bytes > 0) return bytes;
#endif
  return int64_t(32) << 20;
}

}  // namespace constrained_ops
