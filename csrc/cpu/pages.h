// Large fresh memory. It is mapped page by page as it is first written, which costs many times the writing itself, and
// later passes look up each page anew; pages of 2 MiB, where the system grants them on request, make that few.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace constrained_ops {

// Only for pages wholly inside, so that no other memory changes; a refusal changes nothing.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] uintptr_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  if (bytes < 2 * page) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Where a kernel writes a result of its own: null if it is empty.
template <typename Tensor>
void* result_data(const Tensor& result) {
  if (result.numel() == 0) return nullptr;
  void* data = result.mutable_data_ptr();
  ask_for_huge_pages(data, result.numel() * result.element_size());
  return data;
}

}  // namespace constrained_ops
