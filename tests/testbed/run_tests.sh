#!/bin/bash
# The end-to-end tests, inside a cluster: those that leave it alone side by side, for they mostly
# wait, then one by one those that need the cores or kill what the others stand on, then what the
# audit log of all says.
#
#   run_tests.sh PYTHON [option of pytest ...]
set -uo pipefail
cd "$(dirname "$0")/../.."

python=$1 chosen=0 failed=0
shift
kubectl cordon node-2 > /dev/null # for the tests that lose a node; all others know of one
part() {
  "$python" -m pytest -q tests/e2e -p no:cacheprovider "$@"
  case $? in
    0) chosen=1 ;;
    5) ;; # the options choose no test of this part
    *) chosen=1 failed=1 ;;
  esac
}
part -m "testbed and not (chaos or alone or slow)" -n 3 --dist worksteal "$@"
part -m "(chaos or alone) and not slow" "$@"
if ((chosen)); then
  [[ " $* " == *" -k"* ]] || export QTT_WHOLE_SUITE=1
  "$python" -m pytest -q -rs -p no:cacheprovider -m "testbed and slow" tests/e2e/test_least_privilege.py || failed=1
fi
((chosen)) || echo "run_tests: the options choose no test" >&2
exit $((failed || !chosen))
