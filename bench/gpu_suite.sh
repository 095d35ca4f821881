#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, without a network: build the extension, run the GPU-marked tests,
# check memory accesses with compute-sanitizer, run the benchmarks. A part that fails does not stop the next one.
#
#   bench/gpu_suite.sh [--dry-run]
#
# Needs CUDA with nvcc, and a python3 with torch >= 2.11, triton, pytest, pytest-benchmark, pytest-timeout, hypothesis,
# setuptools >= 77 and cmake; with pytest-xdist the tests run in several processes.
# PYTHON names another interpreter, FASTUFT_OUT another folder for the result file (DEVICE/DATE.json below it;
# default bench/results), FASTUFT_BUDGET other seconds for everything, FASTUFT_WHEELS a folder of wheels to install for the
# suite only: with pillow, safetensors and filelock there, the training step is measured too.
set -uo pipefail

usage() { sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; }

dry_run=0
case "${1-}" in
  '') ;;
  --dry-run) dry_run=1 ;;
  -h | --help) usage; exit 0 ;;
  *) echo "gpu_suite: unknown argument '$1'; the only one is --dry-run" >&2; exit 2 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
cd "$root" || exit 2
python=${PYTHON:-python3}
out=${FASTUFT_OUT:-bench/results}
budget=${FASTUFT_BUDGET:-530}
wheels=()
if [ -n "${FASTUFT_WHEELS-}" ]; then
  shopt -s nullglob
  wheels=("$FASTUFT_WHEELS"/*.whl)
  shopt -u nullglob
  if ((${#wheels[@]} == 0)); then
    echo "gpu_suite: FASTUFT_WHEELS='$FASTUFT_WHEELS' has no wheel (*.whl); name a folder of wheels, or leave it unset" >&2
    exit 2
  fi
fi

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
parts=$work/parts.tsv
: >"$parts"
started=$SECONDS
failed=0

record() { # name status seconds detail
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$parts"
}

# part NAME SECONDS COMMAND...: run it for at most SECONDS, or what is left of the budget; log, count, go on.
part() {
  local name=$1 cap=$2 log begin rest status detail
  shift 2
  if ((dry_run)); then
    printf 'would run %s (at most %s s):' "$name" "$cap"
    printf ' %q' "$@"
    printf '\n'
    return 0
  fi
  rest=$((budget - (SECONDS - started)))
  if ((rest < 5)); then
    echo "== $name: left out, the time is used up"
    record "$name" "out of time" 0 ""
    failed=1
    return 0
  fi
  log=$work/$name.log
  begin=$SECONDS
  echo "== $name"
  # Interrupted, pytest still writes the figures that it has.
  timeout --signal=INT --kill-after=10 "$((rest < cap ? rest : cap))" "$@" >"$log" 2>&1
  status=$?
  # pytest ends with 5 where every test file was skipped for want of a package.
  # The last line that says something: pytest's and the sanitizer's summaries end their output.
  detail=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-160)
  case $status in
    0) record "$name" ok "$((SECONDS - begin))" "$detail" ;;
    5 | 77) record "$name" "not available" "$((SECONDS - begin))" "$detail" ;;
    124 | 137) record "$name" "timed out" "$((SECONDS - begin))" "$detail"; failed=1 ;;
    *) record "$name" failed "$((SECONDS - begin))" "$detail"; failed=1 ;;
  esac
  if ((status == 0)); then tail -n 3 "$log"; else tail -n 40 "$log"; fi
}

# compute-sanitizer with one tool over the small cases; 77 where the tool cannot work on this machine.
# shellcheck disable=SC2329  # called through bash -c
sanitize() {
  local tool=$1 log=$work/sanitizer-$1.txt status
  if ! command -v compute-sanitizer >/dev/null; then
    echo 'compute-sanitizer is not on the PATH'
    return 77
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 60 \
    "$python" -P "$root/bench/small_cases.py" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  if ((status != 0)) && grep -qi 'device not supported' "$log"; then
    echo 'compute-sanitizer does not support this device here'
    return 77
  fi
  return "$status"
}
export -f sanitize
export root work python

if ((!dry_run)) && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_suite: $python has no torch that sees a CUDA device; on a CPU run make test and make bench" >&2
  exit 2
fi

# The package is installed into a folder of its own; -P keeps Python from importing the source tree in its stead.
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
pytest=("$python" -P -m pytest -q -p no:cacheprovider --continue-on-collection-errors)

# One process a benchmark file: what is slow or breaks costs its own figures only.
benchmark() { # NAME SECONDS [WHICH ROWS]
  part "bench-$1" "$2" "${pytest[@]}" "bench/bench_${1%-compiled}.py" --benchmark-only --device=cuda --seconds=0.3 \
    --benchmark-json="$work/raw-$1.json" "${@:3}"
}

offline=("$python" -m pip install --quiet --no-index --no-deps --target "$work/site")
((${#wheels[@]})) && part wheels 30 "${offline[@]}" "${wheels[@]}"
install=("${offline[@]}" --no-build-isolation .)
part build 100 env FASTUFT_BUILD=cuda "${install[@]}"
# The rest does not need the extension, but the package.
((failed)) && part install-without-extension 30 env FASTUFT_BUILD=none "${install[@]}"
# Most of the tests' time goes into compiling kernels.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
gpu_tests() { # NAME SECONDS FOLDERS...
  part "$1" "$2" "${pytest[@]}" "${workers[@]}" "${@:3}" -m 'gpu and not slow' --timeout=60
}

# DALI's tests share fixtures that need Pillow, which comes with it.
dali=()
"$python" -c 'import nvidia.dali, PIL' 2>/dev/null && dali=(tests/data/test_dali_pipeline.py)

# Most valuable first; the caps up to racecheck fit the budget, and the last four take what is left.
gpu_tests values 75 tests/loss tests/kernels
# Rows of torch.compile, which may take longer to compile than all others to run, come last.
benchmark loss 80 -k 'not compiled'
benchmark step 80 -k 'not compiled'
benchmark mix 40
gpu_tests other-tests 45 tests/mix/test_mix_gpu.py tests/trainer/test_kernel_check.py tests/trainer/test_runs.py \
    tests/trainer/test_resuming.py tests/trainer/test_train_step.py tests/evaluate/test_metrics.py "${dali[@]}"
benchmark enqueue 15
benchmark loss_sweep 25
benchmark momentum 10
# Compiled here once, so that the sanitizer's time goes into what it watches.
part small-cases 20 "$python" -P bench/small_cases.py
part memcheck 20 bash -c 'sanitize memcheck'
part racecheck 20 bash -c 'sanitize racecheck'
benchmark loss-compiled 60 -k compiled
benchmark step-compiled 60 -k compiled
benchmark evaluate 60
benchmark streams 60

if ((dry_run)); then
  echo "would write $out/DEVICE/DATE.json"
  exit 0
fi

echo
shopt -s nullglob
figures=("$work"/raw-*.json)
if ((${#figures[@]})); then
  "$python" bench/report.py collect "${figures[@]}" --results "$out" --parts "$parts" || failed=1
else
  echo 'no benchmark file was written' >&2
  failed=1
fi
echo
awk -F '\t' '{ printf "%-15s %-14s %4d s  %s\n", $1, $2, $3, $4 }' "$parts"
echo "total $((SECONDS - started)) s"
exit "$failed"
