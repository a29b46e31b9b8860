#!/usr/bin/env bash
# Runs the project's checks and tests; the last lines are pytest's own and the verdict.
#
#   tests/run.sh                     everything
#   tests/run.sh lint cpp unit e2e   only the named parts, in this order
#   tests/run.sh unit -- -k NAME     arguments after -- go to pytest
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

parts=()
while (($#)); do
  case $1 in
    lint | cpp | unit | e2e) parts+=("$1") ;;
    --) shift && break ;;
    *)
      echo "usage: tests/run.sh [lint] [cpp] [unit] [e2e] [-- PYTEST ARGUMENTS]" >&2
      exit 2
      ;;
  esac
  shift
done
((${#parts[@]})) || parts=(lint cpp unit e2e)
pytest_args=("$@")

python=$(scripts/setup.sh dev) || { echo "FAILED: the environment could not be set up"; exit 1; }
bin=$(dirname "$python")
failed=()

# check NAME COMMAND...: quiet when it passes, its output when it does not.
check() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then
    echo "ok      $name"
  else
    echo "FAILED  $name"
    echo "$output"
    failed+=("$name")
  fi
}

lint() {
  check "ruff check" "$bin/ruff" check .
  check "ruff format" "$bin/ruff" format --check .
  check "clang-format" "$bin/clang-format" --dry-run --Werror $(find csrc tests/csrc -name "*.?pp")
  check "mypy" "$bin/mypy" --strict -p vllm_dualpath
  check "lint-imports" "$bin/lint-imports"
}

# The C++ core under both sanitizers: they cannot share a process.
cpp() {
  local ucx variant
  ucx=$("$python" -c "import libucx, os; print(os.path.dirname(libucx.__file__))")
  for variant in asan tsan; do
    check "C++ tests, $variant" make -s -j"$(nproc)" -C tests/csrc VARIANT="$variant" UCX="$ucx" run
  done
}

# pytest's exit code 5 is "no test collected": an error here too.
# A worker holds a vLLM, so there are few. Tests of a file stay in one: they share what is dear to
# start. In the order of their names the files that take long come first, and none is left alone.
# One thread of torch's each: more threads than cores wait for each other.
unit() {
  local workers
  workers=$(nproc)
  OMP_NUM_THREADS=1 "$python" -m pytest -q -n $((workers < 4 ? workers : 4)) --dist loadfile \
    --no-loadscope-reorder tests --ignore=tests/e2e "${pytest_args[@]}" || failed+=("unit tests")
}
e2e() { "$python" -m pytest -q tests/e2e "${pytest_args[@]}" || failed+=("end-to-end tests"); }

for part in "${parts[@]}"; do
  echo "== $part"
  "$part"
done

if ((${#failed[@]})); then
  printf -v list '%s, ' "${failed[@]}"
  echo "FAILED: ${list%, }"
  exit 1
fi
echo "PASSED: ${parts[*]}"
