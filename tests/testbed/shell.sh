#!/bin/bash
# What `make cluster` runs inside the cluster: installs the operator, then a shell, or the command given.
set -euo pipefail
cd "$(dirname "$0")/../.."

tests/testbed/operator.sh | kubectl apply --server-side -f - > /dev/null
if (($#)); then
  exec "$@"
fi
cat << END

A Kubernetes of its own on this machine; it ends with this shell. KUBECONFIG is set:
  kubectl get pods -A                                        what runs
  kubectl -n quicktune-system logs -f deploy/quicktune-operator
  .venv/bin/python -m pytest tests/e2e -m testbed -k NAME    a part of the end-to-end tests
  tests/testbed/cluster.py restart kube-apiserver --after 5  kill, freeze or restart a program
  tests/testbed/cluster.py status

END
exec bash --noprofile --rcfile <(echo 'PS1="cluster:\w# "') -i
