#include "levels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace constrained_ops {
namespace {

#define CO_LOOPS(name, level) \
  {name,                      \
   level::bounded_loop,       \
   level::exponential_loop,   \
   level::softmax_loop,       \
   level::projection_loop,    \
   level::bijection_loop,     \
   level::step_loop}

constexpr Loops baseline_loops = CO_LOOPS("baseline", baseline);

const Loops& choose() {
  const char* variable = std::getenv("CONSTRAINED_OPS_SIMD");
  const std::string wanted = variable ? variable : "";
#ifdef CO_X86_LEVELS
  static constexpr Loops v3_loops = CO_LOOPS("x86-64-v3", x86_64_v3);
  static constexpr Loops v4_loops = CO_LOOPS("x86-64-v4", x86_64_v4);
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && (wanted.empty() || wanted == v4_loops.name)) return v4_loops;
  if (v3 && (wanted.empty() || wanted == v3_loops.name)) return v3_loops;
#endif
  if (wanted.empty() || wanted == baseline_loops.name) return baseline_loops;
  throw std::runtime_error("CONSTRAINED_OPS_SIMD=" + wanted + " is not available on this processor");
}

}  // namespace

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

}  // namespace constrained_ops
