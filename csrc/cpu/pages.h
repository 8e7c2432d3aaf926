// Memory of large results. A fresh one is mapped page by page as it is first written, which costs many times the
// writing itself; pages of 2 MiB, where the system grants them on request, make that few.
#pragma once

#include "../tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace constrained_ops {

// Where a kernel writes a result of its own: null if it is empty.
template <typename Tensor>
void* result_data(const Tensor& result) {
  if (result.numel() == 0) return nullptr;
  void* data = result.mutable_data_ptr();
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t bytes = result.numel() * result.element_size();
  if (bytes >= 2 * page) {  // only pages wholly inside, so that no other memory changes; a refusal changes nothing
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return data;
}

}  // namespace constrained_ops
