// The threads behind include/cuda_runtime.h as fibers that take turns on the calling thread: quick, the same in every
// run, and a barrier that not all come to shows at once. threads.cpp does the same with real threads, for sanitizers.
//
// swapcontext() asks the kernel for the signal mask at each switch, which takes far longer than the switch. So it only
// starts a fiber, which from there on takes one kernel after the other, and switches are jumps from stack to stack.
#undef _FORTIFY_SOURCE  // of which it would complain
#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "include/cuda_runtime.h"

constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr int warp_size = 32, max_threads = 1024;
constexpr size_t stack_bytes = 128 * 1024;

// Those who wait for each other. Counts rounds; a round is over when all have come.
struct Barrier {
  int expected = 0, arrived = 0;
  unsigned round = 0;

  void reset(int threads) { *this = {threads, 0, 0}; }
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf here;
  bool started = false;
  const Barrier* waits_at;
  unsigned round;  // ... for the end of this round
  const char* what;
  bool done;
  int shuffles;

  bool ready() const { return !done && (waits_at == nullptr || waits_at->round != round); }
};

struct Device {
  std::mutex in_use;
  std::vector<Fiber> fibers = std::vector<Fiber>(max_threads);
  Barrier block, warps[max_threads / warp_size];
  uint64_t slots[2][max_threads];
  std::unique_ptr<unsigned char[]> shared;
  bool vote = false;
  const std::function<void()>* kernel;
  jmp_buf scheduler;
  std::thread::id thread;  // that the fibers run on
  std::string failure;
  unsigned blocks_run = 0;
  std::set<const void*> launched;
};

Device& device() {
  static Device instance;
  return instance;
}

Fiber& self() { return device().fibers[threadIdx.x]; }

struct Stopped {};  // unwinds a fiber that waits for one that failed

void back_to_scheduler() {
  if (_setjmp(self().here) == 0) _longjmp(device().scheduler, 1);
}

void wait(Barrier& barrier, const char* what) {
  Fiber& fiber = self();
  fiber.waits_at = &barrier;
  fiber.round = barrier.round;
  fiber.what = what;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.round;
  }
  back_to_scheduler();
  if (!device().failure.empty()) throw Stopped{};
  fiber.waits_at = nullptr;
}

void fail(const std::string& what) {
  if (device().failure.empty()) device().failure = what;
}

void run_kernel() {
  try {
    (*device().kernel)();
  } catch (const Stopped&) {
  } catch (const std::exception& error) {
    fail(error.what());
  }
  self().done = true;
}

void fiber_main() {
  for (;;) {
    run_kernel();
    back_to_scheduler();
  }
}

void start(Fiber& fiber) {
  fiber.started = true;
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(stack_bytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

void resume(int thread) {
  threadIdx = dim3(thread);
  Fiber& fiber = self();
  if (_setjmp(device().scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  start(fiber);
}

void run_block(int threads) {
  Device& d = device();
  d.block.reset(threads);
  for (int w = 0; w < threads / warp_size; ++w) d.warps[w].reset(warp_size);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = d.fibers[t];
    fiber.waits_at = nullptr;
    fiber.done = false;
    fiber.shuffles = 0;
  }
  // Up and down in turns, and another way first in the next block: a missing barrier shows in one order or the other.
  for (bool progress = true, backwards = d.blocks_run++ % 2 != 0; progress; backwards = !backwards) {
    progress = false;
    for (int i = 0; i < threads; ++i) {
      const int t = backwards ? threads - 1 - i : i;
      if (!d.fibers[t].ready() && (d.failure.empty() || d.fibers[t].done)) continue;
      resume(t);
      progress = true;
    }
    for (int t = 0; t < threads && !progress && d.failure.empty(); ++t) {
      if (d.fibers[t].done) continue;
      fail("thread " + std::to_string(t) + " waits at a " + d.fibers[t].what + " that not all come to");
      progress = true;  // once more, to unwind
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return device().shared.get(); }

void sync_block() { wait(device().block, "__syncthreads"); }

bool any_of_block(bool condition) {
  Device& d = device();
  d.vote = d.vote || condition;
  wait(d.block, "__syncthreads_or");
  const bool outcome = d.vote;
  wait(d.block, "__syncthreads_or");
  d.vote = false;
  wait(d.block, "__syncthreads_or");
  return outcome;
}

uint64_t exchange(unsigned mask, uint64_t value, int source, int width) {
  if (mask != 0xffffffffu) throw std::logic_error("a warp operation leaves out lanes that take part in it");
  if (width < 1 || width > warp_size || (width & (width - 1)) != 0)
    throw std::logic_error("shuffle of impossible width");
  // A lane writes a slot again only after all have come to the next exchange, and so read it: two sets are enough.
  uint64_t* const slots = device().slots[self().shuffles++ % 2] + threadIdx.x / warp_size * warp_size;
  slots[lane()] = value;
  wait(device().warps[threadIdx.x / warp_size], "warp operation");
  const bool reachable = source >= 0 && source < warp_size && source / width <= lane() / width;
  return slots[reachable ? source : lane()];
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel, const void* address) {
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.in_use);
  d.launched.insert(address);
  if (d.thread != std::this_thread::get_id()) {  // another one's thread_locals may be at hand on their stacks
    for (Fiber& fiber : d.fibers) fiber.started = false;
    d.thread = std::this_thread::get_id();
  }
  d.kernel = &kernel;
  d.failure.clear();
  d.shared = std::make_unique<unsigned char[]>(shared_bytes);
  blockDim = block;
  gridDim = grid;
  for (unsigned b = 0; b < grid.x && d.failure.empty(); ++b) {
    blockIdx = dim3(b);
    std::memset(d.shared.get(), 0xff, shared_bytes);
    run_block(static_cast<int>(block.x));
  }
  d.shared.reset();
  if (!d.failure.empty()) throw std::runtime_error("emulated kernel: " + d.failure);
}

}  // namespace emulation

// The addresses of the kernels launched since the last call, `most` of them; returns how many there are.
extern "C" __attribute__((visibility("default"))) int emulation_launched(const void** kernels, int most) {
  emulation::Device& d = emulation::device();
  const std::lock_guard<std::mutex> lock(d.in_use);
  int count = 0;
  for (const void* kernel : d.launched)
    if (count++ < most) kernels[count - 1] = kernel;
  d.launched.clear();
  return count;
}
