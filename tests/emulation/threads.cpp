// The threads behind include/cuda_runtime.h as threads of the operating system, in a pool that lives as long as the
// process: what sanitizers understand. fibers.cpp does the same more quickly.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <ctime>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "include/cuda_runtime.h"

constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr int warp_size = 32, max_warps = 32;
constexpr int patience_seconds = 20;

using Word = std::atomic<uint32_t>;

// Sleeps while the word holds `value`; false if that took too long.
bool wait_while(Word& word, uint32_t value) {
  const timespec patience{patience_seconds, 0};
  while (word.load(std::memory_order_acquire) == value) {
    const long status = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &patience, nullptr, 0);
    if (status == -1 && errno == ETIMEDOUT) return word.load(std::memory_order_acquire) != value;
  }
  return true;
}

void wake_all(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

struct Stopped {};  // thrown in the threads that wait for one that failed

struct Failure {
  std::atomic<bool> happened{false};
  std::mutex mutex;
  std::string message;

  void report(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!happened.load()) message = what;
    happened.store(true);
  }
} failure;

class Barrier {
 public:
  void reset(int threads) {
    expected_ = threads;
    arrived_.store(0);
  }

  void wait(const char* what) {
    if (failure.happened.load()) throw Stopped{};
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == expected_) {
      arrived_.store(0, std::memory_order_relaxed);
      open();
    } else if (!wait_while(generation_, generation)) {
      failure.report(std::string("not all threads came to a ") + what);
    }
    if (failure.happened.load()) throw Stopped{};
  }

  void open() {
    generation_.fetch_add(1, std::memory_order_acq_rel);
    wake_all(generation_);
  }

 private:
  int expected_ = 0;
  std::atomic<int> arrived_{0};
  Word generation_{0};
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][warp_size];
  Word start{0};  // counts the launches this warp takes part in
};

struct Launch {
  dim3 grid, block;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes;
  const std::function<void()>* kernel;
};

struct Pool {
  Warp warps[max_warps];
  Barrier block;
  Launch launch;
  Word finished{0};
  std::atomic<bool> vote{false};
  int threads = 0;
  std::mutex in_use;
};

// Never destroyed: its threads sleep until the process ends.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

thread_local Warp* own_warp;
thread_local int shuffles;

void run_blocks(const Launch& launch) {
  for (unsigned block = 0; block < launch.grid.x; ++block) {
    blockIdx = dim3(block);
    if (launch.shared_bytes > 0) {
      pool().block.wait("the end of the block before");
      if (threadIdx.x == 0) std::memset(launch.shared.get(), 0xff, launch.shared_bytes);
      pool().block.wait("the start of the block");
    }
    (*launch.kernel)();
  }
}

void serve(int thread) {
  threadIdx = dim3(thread);
  own_warp = &pool().warps[thread / warp_size];
  for (uint32_t seen = 0;; ++seen) {
    while (!wait_while(own_warp->start, seen)) {
    }
    const Launch& launch = pool().launch;
    blockDim = launch.block;
    gridDim = launch.grid;
    shuffles = 0;
    try {
      run_blocks(launch);
    } catch (const Stopped&) {
    } catch (const std::exception& error) {
      failure.report(error.what());
    }
    if (failure.happened.load()) {  // let the others go
      pool().block.open();
      for (Warp& warp : pool().warps) warp.barrier.open();
    }
    pool().finished.fetch_add(1, std::memory_order_acq_rel);
    wake_all(pool().finished);
  }
}

}  // namespace

unsigned char* shared_memory() { return pool().launch.shared.get(); }

void sync_block() { pool().block.wait("__syncthreads"); }

bool any_of_block(bool condition) {
  Pool& p = pool();
  if (condition) p.vote.store(true);
  p.block.wait("__syncthreads_or");
  const bool outcome = p.vote.load();
  p.block.wait("__syncthreads_or");
  p.vote.store(false);
  p.block.wait("__syncthreads_or");
  return outcome;
}

uint64_t exchange(unsigned mask, uint64_t value, int source, int width) {
  if (mask != 0xffffffffu) throw std::logic_error("a warp operation leaves out lanes that take part in it");
  if (width < 1 || width > warp_size || (width & (width - 1)) != 0)
    throw std::logic_error("shuffle of impossible width");
  // A lane comes to write a slot again only after a barrier that all pass who read it: two sets of slots are enough.
  uint64_t* const slots = own_warp->slots[shuffles++ % 2];
  const int lane = emulation::lane();
  slots[lane] = value;
  own_warp->barrier.wait("warp operation");
  const bool reachable = source >= 0 && source < warp_size && source / width <= lane / width;
  return slots[reachable ? source : lane];
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel, const void*) {
  Pool& pool = emulation::pool();
  const std::lock_guard<std::mutex> lock(pool.in_use);
  const int threads = static_cast<int>(block.x);
  for (; pool.threads < threads; ++pool.threads) std::thread(serve, pool.threads).detach();

  failure.happened.store(false);
  pool.launch = {grid, block, std::make_unique<unsigned char[]>(shared_bytes), shared_bytes, &kernel};
  pool.block.reset(threads);
  pool.finished.store(0);
  for (int warp = 0; warp < threads / warp_size; ++warp) {
    pool.warps[warp].barrier.reset(warp_size);
    pool.warps[warp].start.fetch_add(1, std::memory_order_acq_rel);
    wake_all(pool.warps[warp].start);
  }
  for (uint32_t finished;
       (finished = pool.finished.load(std::memory_order_acquire)) < static_cast<uint32_t>(threads);) {
    wait_while(pool.finished, finished);
  }
  pool.launch.shared.reset();
  if (failure.happened.load()) throw std::runtime_error("emulated kernel: " + failure.message);
}

}  // namespace emulation
