#!/usr/bin/env bash
# Everything that wants a GPU, in one go and without a network: build, tests, sanitizers, benchmarks, profile.
#
#   benchmarks/gpu.sh [--output DIR] [--seconds N] [--stages NAME,NAME...] [--quick]
#
#   --output   where results go as they come (./gpu_results): summary.txt has a line for each stage, NAME.log the rest
#   --seconds  for all stages together (600, an hour without a GPU); what one does not use the later ones get
#   --stages   some of: build tests gpu sanitize benchmarks kernels ncu triton demo
#   --quick    little of each, to try the script itself
#
# Exit status 1 if a stage failed or was cut off; the others run all the same. Without a GPU the stages that need none
# run, and the summary says what was skipped. Environment: PYTHON (python3), JOBS (the number of processors), WHEEL (one
# that was built elsewhere for this Python and GPU, whose libraries spare the build).
set -uo pipefail
cd "$(dirname "$0")/.."

output=gpu_results seconds="" quick="" chosen=""
while [ $# -gt 0 ]; do
  case $1 in
    --output) output=$2; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --stages) chosen=${2//,/ }; shift 2 ;;
    --quick) quick=yes; shift ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
mkdir -p "$output"
output=$(cd "$output" && pwd)
export LC_ALL=C.UTF-8 PYTHONUNBUFFERED=1 MPLBACKEND=Agg PIP_DISABLE_PIP_VERSION_CHECK=1
PATH=$PATH:/usr/local/cuda/bin

# A stage and its share of the time, in the order in which they run.
all="build:70 tests:15 gpu:10 sanitize:17 benchmarks:17 kernels:4 ncu:9 triton:16 demo:3"
stages=""
for each in $all; do
  if [ -z "$chosen" ] || [[ " $chosen " == *" ${each%:*} "* ]]; then stages+="$each "; fi
done
for name in $chosen; do
  if [[ " $all" != *" $name:"* ]]; then echo "no stage $name in $(sed 's/:[0-9]*//g' <<<"$all")" >&2; exit 2; fi
done

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [ -n "$gpu" ]; then export CONSTRAINED_OPS_TEST_EMULATION=off; fi  # the real kernels are here
: "${seconds:=$([ -n "$gpu" ] && echo 600 || echo 3600)}"
failed=0
: >"$output/summary.txt"
note() { echo "$*" | tee -a "$output/summary.txt"; }

# --- What the stages do: each returns 0, or fails; 77 means that it cannot run here, for a reason in $output/NAME.skipped

skip() { echo "$2" >"$output/$1.skipped"; return 77; }

needs_gpu() {
  [ -n "$gpu" ] || { skip "$1" "no GPU"; return; }
  "$python" -c 'from constrained_ops import _library
assert _library.has_cuda_library, "no CUDA library: build first, with nvcc"'
}

stage_environment() {
  date -u
  git log -1 --format='commit %H %s' 2>/dev/null && git status --short 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv 2>&1
  for tool in nvcc compute-sanitizer ncu g++ cmake; do type -P "$tool" && "$tool" --version 2>&1 | tail -1; done
  uname -srm
  nproc
  free -g 2>/dev/null
  "$python" -VV
  "$python" -c 'import torch; print(torch.__config__.show())
if torch.cuda.is_available(): print(torch.cuda.get_device_properties())'
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|hypothesis|cmake|ninja|pybind11|setuptools|nvidia|entmax) ?'
}

stage_build() {
  if [ -n "$quick" ] && [ -z "$gpu" ]; then skip build "--quick, no GPU"; return; fi
  if [ -n "$gpu" ]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export CONSTRAINED_OPS_CUDA=on
  fi
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
  if [ -n "${WHEEL:-}" ]; then
    "$python" -c 'import sys, zipfile
for name in (archive := zipfile.ZipFile(sys.argv[1])).namelist():
    if name.endswith(".so"): print(archive.extract(name))' "$WHEEL" || return
  else
    MAX_JOBS=$jobs "$python" -m pip install --no-build-isolation --no-deps -v -e . || return
  fi
  "$python" -m constrained_ops info | tee "$output/build_info.txt"
}

pytest() {
  TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m pytest -q -p no:cacheprovider --durations=10 "$@"
}

in_parallel() { # the options of pytest-xdist, where that is installed
  [ "$jobs" -gt 1 ] && "$python" -c 'import xdist' 2>/dev/null && echo "-n$jobs --dist=worksteal"
}

# What a GPU adds nothing to. Where there is one, tests on the CPU are left to other machines, too.
elsewhere=() beside=""
if [ -n "$gpu" ]; then
  elsewhere=(--ignore=tests/test_{cuda_compile,triton_compile,distributed,demo}.py)
  beside=" and not cpu and (not reference or cuda)"
fi

stage_tests() {
  [ -z "$gpu" ] || needs_gpu tests || return
  local which=(tests "${elsewhere[@]}" --ignore=tests/test_gpu.py)
  [ -z "$quick" ] || which=(tests/test_parametrizations.py)
  # shellcheck disable=SC2046
  pytest $(in_parallel) "${which[@]}" -k "not triton$beside"
}

stage_gpu() { # streams, CUDA graphs, more than 2^31 elements: one process, which may want most of the memory
  needs_gpu gpu || return
  pytest -v tests/test_gpu.py -k "not triton" && grep -q " passed" "$output/gpu.log"
}

stage_triton() {
  [ -z "$quick$gpu" ] || needs_gpu triton || return
  local which=(tests "${elsewhere[@]}" --ignore=tests/test_gpu.py) status=0
  [ -z "$quick" ] || which=(tests/test_backends.py)
  # shellcheck disable=SC2046
  pytest $(in_parallel) "${which[@]}" -k "triton" || status=$?
  [ -z "$gpu" ] || pytest tests/test_gpu.py -k "triton" || status=$?
  return $status
}

stage_sanitize() { # four at a time: each is busy with one processor
  needs_gpu sanitize || return
  type -P compute-sanitizer || { skip sanitize "no compute-sanitizer"; return; }
  local subset='cuda and (small or float32 or bfloat16) and not transposed and not expanded'
  subset+=' and (small or elementwise or simplex or projection or launch or supports)'
  [ -z "$quick" ] || subset='cuda and small'
  local tool pids=() status=0 told=""
  set -m  # or else what runs in the background would not be interrupted
  for tool in memcheck racecheck synccheck initcheck; do
    local only=(--kernel-name kns=constrained_ops)
    [ "$tool" != initcheck ] || only=()  # it has to see what other kernels write
    # Without PyTorch's cache every tensor has bounds of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 10 $(($1 > 30 ? $1 - 15 : $1)) \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 --report-api-errors no --launch-timeout 0 \
      "${only[@]}" "$python" -m pytest -q -p no:cacheprovider tests/test_backends.py tests/test_step.py -k "$subset" \
      >"$output/sanitize_$tool.log" 2>&1 &
    pids+=($!)
  done
  for tool in memcheck racecheck synccheck initcheck; do
    wait "${pids[0]}"
    local one=$?
    pids=("${pids[@]:1}")
    echo "$tool: exit status $one"
    grep -E '(ERROR|RACECHECK) SUMMARY|[0-9]+ (passed|failed|skipped).* in ' "$output/sanitize_$tool.log" | tail -2
    [ $one = 0 ] && told+="$tool ok, " || { told+="$tool failed ($one), "; status=1; }
  done
  echo "${told%, }"
  return $status
}

stage_benchmarks() {
  local options=(--csv "$output/benchmarks.csv" --seconds $(($1 > 40 ? $1 - 25 : $1)))
  if [ -z "$gpu" ] || [ "$1" -lt 240 ]; then options+=(--quick)
  elif [ "$1" -lt 1800 ]; then options+=(--floors); fi  # all of it takes longer
  [ -z "$quick" ] || options+=(--quick --no-compile --only bounded --only projection --only step_box)
  "$python" -m benchmarks "${options[@]}"
  local status=$?
  "$python" -m benchmarks.floors "$output/benchmarks.csv" >"$output/floors.md" || status=$?
  "$python" -m benchmarks.plots --detail "$output/benchmarks.csv" "$output/plots" && return $status
}

numbers() { [ -n "$gpu" ] && [ -z "$quick" ] && echo $((1 << 26)) || echo $((1 << 17)); }

stage_kernels() { "$python" -m benchmarks.kernels --numbers "$(numbers)" --csv "$output/kernels.csv"; }

stage_ncu() {
  needs_gpu ncu || return
  type -P ncu || { skip ncu "no ncu"; return; }
  ncu --clock-control none --metrics "$("$python" -m benchmarks.kernels --ncu-metrics)" \
    --kernel-name-base demangled --kernel-name regex:constrained_ops --csv --page raw --print-units base \
    --log-file "$output/ncu.csv" "$python" -m benchmarks.kernels --once --numbers "$(numbers)"
  local status=$?
  if grep -qE 'ERR_NVGPUCTRPERM|Failed to initialize the profiler|LibraryNotLoaded' "$output/ncu.csv"; then
    skip ncu "ncu may not read the counters here"
    return
  fi
  "$python" -m benchmarks.kernels --ncu "$output/ncu.csv" >"$output/ncu.txt" && return $status
}

stage_demo() {
  local device=cpu steps=200
  [ -z "$gpu" ] || device=cuda
  [ -z "$quick" ] || steps=5
  "$python" -m constrained_ops demo --device $device --steps $steps --output "$output/demo.png"
}

# --- Running them ------------------------------------------------------------------------------------------------------

run() { # NAME SECONDS: in a process of its own, which a timeout can end with all that it started
  local name=$1 limit=$2 begin=$SECONDS status detail
  rm -f "$output/$name.skipped"
  set -m
  ("stage_$name" "$limit") >"$output/$name.log" 2>&1 </dev/null &
  local pid=$!
  set +m
  (
    sleep "$limit"
    kill -INT -- -$pid && sleep 10 && kill -KILL -- -$pid
  ) >/dev/null 2>&1 &
  local watch=$!
  wait $pid
  status=$?
  kill $watch 2>/dev/null
  wait $watch 2>/dev/null
  kill -KILL -- -$pid 2>/dev/null
  detail=$(grep -vE '^\s*$' "$output/$name.log" | tail -1 | cut -c1-150)
  if [ $status = 77 ]; then
    note "skipped  $name: $(cat "$output/$name.skipped")"
  elif [ $status = 0 ]; then
    note "ok       $name ($((SECONDS - begin)) s): $detail"
  elif [ $((SECONDS - begin)) -ge "$limit" ]; then
    failed=1
    note "CUT OFF  $name (after $limit s): $detail"
  else
    failed=1
    note "FAILED   $name ($((SECONDS - begin)) s, status $status): $detail"
  fi
}

stage_environment >"$output/environment.txt" 2>&1
note "$(date -u '+%Y-%m-%d %H:%M UTC'), $(git log -1 --format=%h 2>/dev/null), ${gpu:-no GPU}"
if [ -z "$gpu" ] && nvidia-smi -L >/dev/null 2>&1; then
  failed=1
  note "FAILED   there is a GPU, but torch does not see it"
fi
for each in $stages; do
  name=${each%:*} left=0
  for other in $stages; do left=$((left + ${other#*:})); done
  remaining=$((seconds - SECONDS))
  limit=$((remaining * ${each#*:} / left))
  stages=${stages#"$each "}
  run "$name" $((limit > 5 ? limit : 5))
done
note "$([ $failed = 0 ] && echo "all is well" || echo "something failed"), $SECONDS s, results in $output"
exit $failed
