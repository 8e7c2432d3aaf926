"""How fast a step could be if it only moved its bytes: ``python -m benchmarks.bytes_alone``.

Beside an optimizer's step and its peer, a bare loop in C++ passes over memory of its own that is as large and lies as
ours: gradient, parameter and moments are read, parameter and moments, and on raw the transform's result, are written,
and a subtraction stands for all arithmetic. It does so in a few ways, of which the fastest counts: the peer's time over
that is what a step without any arithmetic would reach.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch.utils.cpp_extension import load_inline

from constrained_ops.optim._memory import empty

from .bench_steps import JOBS
from .floors import table_of
from .harness import FULL, OURS, QUICK, Effort, Shape, Step, measure

SOURCE = r"""
#include <ATen/Parallel.h>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef float Line __attribute__((vector_size(64)));
constexpr int64_t numbers = sizeof(Line) / sizeof(float), per_task = 32768;

static Line load(const float* p) {
  Line line;
  std::memcpy(&line, p, sizeof(line));
  return line;
}
static void store(float* p, Line line) { std::memcpy(p, &line, sizeof(line)); }
static void store_past_caches(float* p, Line line) {
#if defined(__SSE2__)
  for (int i = 0; i < 16; i += 4) {
    __m128 part;
    std::memcpy(&part, reinterpret_cast<const float*>(&line) + i, sizeof(part));
    _mm_stream_ps(p + i, part);
  }
#else
  store(p, line);
#endif
}

// grad is read, value and moments are read and written, result is written, or null. Whole lines of so many numbers.
extern "C" void pass_over(const float* grad, float* value, float* m, float* v, float* result, int64_t n, int64_t ahead,
                          bool past_caches) {
  at::parallel_for(0, n / numbers, per_task / numbers, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin * numbers; i < end * numbers; i += numbers) {
      if (ahead) {
        for (const float* p : {grad, static_cast<const float*>(value), static_cast<const float*>(m),
                               static_cast<const float*>(v)})
          __builtin_prefetch(p + i + ahead);
        if (result && !past_caches) __builtin_prefetch(result + i + ahead);
      }
      const Line g = load(grad + i), changed = g - load(value + i);
      store(value + i, changed);
      store(m + i, g - load(m + i));
      store(v + i, g - load(v + i));
      if (result) past_caches ? store_past_caches(result + i, changed) : store(result + i, changed);
    }
  });
}
"""
LINE = 16  # numbers
LOOPS = {"plain": (0, False), "fetched ahead": (512, False), "result past the caches": (512, True)}
CASES = (("step_box", "fused, clamp_", False), ("step_raw", "eager, fused", True))  # writes a result besides
HEADS = [
    "job",
    "shape",
    "peer",
    "peer us",
    "ours us",
    "bytes us",
    "loop",
    "peer / ours",
    "peer / bytes",
    "bytes / ours",
]
SHAPES: tuple[Shape, ...] = ((2**20,), (2**24,))
SMALL: tuple[Shape, ...] = ((2**16,),)


def compiled_loop() -> Callable[..., None]:
    path = load_inline(
        "constrained_ops_bytes_alone",
        SOURCE,
        extra_cflags=["-O3", "-march=native", "-fopenmp"],
        is_python_module=False,
        no_implicit_headers=True,
    )
    function = ctypes.CDLL(path).pass_over
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2 + [ctypes.c_bool]
    function.restype = None
    return function  # type: ignore[no-any-return]


def loop_step(loop: Callable[..., None], shape: Shape, with_result: bool, ahead: int, past_caches: bool) -> Step:
    numbers = math.prod(shape)
    assert numbers % LINE == 0, shape
    grad, p = torch.randn(shape), torch.randn(shape)
    m, v, raw = [empty(name, p, p, p.dtype).normal_() for name in ("exp_avg", "exp_avg_sq", "raw")]
    written = [raw, m, v, p] if with_result else [p, m, v]
    operands = [t.data_ptr() for t in (grad, *written)] + [None] * (not with_result)

    def run() -> None:
        loop(*operands, numbers, ahead, past_caches)

    return Step(run, lambda: [grad, *written], before=grad.neg_)


def compare(loop: Callable[..., None], shapes: Sequence[Shape], effort: Effort) -> list[list[str]]:
    """A line under HEADS for each case and shape."""
    jobs = {job.name: job for job in JOBS}
    lines = []
    for name, peer, with_result in CASES:
        for shape in shapes:
            steps = jobs[name].steps(shape, "cpu", only=[peer])
            for way, (ahead, past_caches) in LOOPS.items():
                if with_result or not past_caches:
                    steps[way] = loop_step(loop, shape, with_result, ahead, past_caches)
            seconds = {who: timing.median for who, timing in measure(steps, "cpu", effort).items()}
            best = min((way for way in LOOPS if way in seconds), key=seconds.__getitem__)
            of_peer, ours, least = seconds[peer], seconds[OURS], seconds[best]
            times = [f"{1e6 * t:,.0f}" for t in (of_peer, ours, least)]
            ratios = [f"{of_peer / ours:.2f}x", f"{of_peer / least:.2f}x", f"{least / ours:.0%}"]
            lines.append([name, "x".join(map(str, shape)), f"`{peer}`", *times, best, *ratios])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.bytes_alone", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples of one small size")
    args = parser.parse_args(argv)
    lines = compare(compiled_loop(), *((SMALL, QUICK) if args.quick else (SHAPES, FULL)))
    print(table_of(HEADS, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
