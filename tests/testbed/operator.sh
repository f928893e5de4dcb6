#!/bin/bash
# Prints what tests and `make cluster` install: the chart on a Redis of their own. Words are Helm's.
#
#   operator.sh [--set NAME=VALUE ...] | kubectl apply --server-side --force-conflicts -f -
set -euo pipefail
cd "$(dirname "$0")/../.."

cat tests/testbed/redis.yaml
exec helm template quicktune-operator helm/quicktune-operator --namespace quicktune-system \
  --skip-tests --values tests/testbed/values.yaml "$@"
