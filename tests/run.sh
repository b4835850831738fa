#!/bin/bash
# The tests, in the order in which they fail fastest. Usage: tests/run.sh [fast]   (with the environment's bin first in PATH)
#   notebooks and modules in step; the notebooks (nbdev_test); the tests (pytest).
#   fast leaves out the tutorials and whatever is marked slow.   CI=true also demands a committed tree.
#   RECON_NB_DATA names the folder of real data; tests that need it skip, with the reason printed, where it is unset.
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-full}
case $mode in full | fast) ;; *) echo "usage: tests/run.sh [fast]"; exit 2 ;; esac

cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # workers share the cores: threads that spin on a busy core cost more than they give
export NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-$OMP_NUM_THREADS}   # the same for UMAP, whose threads spin too
export MPLBACKEND=agg PYTHONHASHSEED=0
failed=()
committed=()
if [ "${CI:-}" = true ]; then committed=(--committed); fi
if [ "$mode" = full ]; then
  notebook_options=(--flags slow)
  pytest_options=()
else
  notebook_options=(--skip_folder_re '^([_.].*|tutorials)$')
  pytest_options=(-m 'not slow')
fi

step() {   # step NAME SECONDS COMMAND...: run under a time limit, remember a failure and go on
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout --kill-after=20 "$limit" "$@" || status=$?
  if [ $status = 124 ]; then echo "$name: stopped after its limit of $limit s"; fi
  if [ $status != 0 ]; then failed+=("$name"); fi
  echo "-- $name: exit $status after $((SECONDS - start)) s"
}

step 'notebooks and modules in step' 120 python tests/check_sync.py "${committed[@]}"
step 'notebooks' 2100 nbdev_test --n_workers "$((cores < 4 ? cores : 4))" --do_print --timing "${notebook_options[@]}"
if [ "${CI:-}" = true ]; then step 'the notebooks left nothing behind' 60 python tests/check_sync.py --committed; fi
if [ ${#failed[@]} != 0 ]; then echo "failed before pytest: ${failed[*]}"; fi

# Last, so that pytest's closing line is the last line. -rs prints each skipped test with its reason, fE each failure in one line.
timeout --kill-after=20 2100 python -m pytest tests -rfEs --durations=10 "${pytest_options[@]}" || failed+=('pytest')
[ ${#failed[@]} = 0 ]
