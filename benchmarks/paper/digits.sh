#!/usr/bin/env bash
# The paper's experiment on the digits: manifests, runs, ledgers, Table 1, figure 5. Goes on where it
# was stopped.
#
#   benchmarks/paper/digits.sh [SEEDS]      # 2 seeds: 8 runs of 60 device-seconds, 12 minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=benchmarks/out/paper-digits bin=${VENV:-.venv}/bin

"$bin/python" examples/digits/prepare.py
"$bin/python" benchmarks/paper/experiment.py "$work/manifests" --only digits --seeds "${1:-2}"
mkdir -p "$work/ledgers"
for manifest in "$work"/manifests/*.yaml; do
    run=$(basename "$manifest" .yaml)
    [[ -s $work/ledgers/$run.jsonl ]] && continue
    "$bin/qtt" run "$manifest" --state-dir "$work/state" --devices cpu:1 --plain --no-test \
        --mount digits=examples/digits/digits > "$work/$run.log"
    "$bin/qtt" ledger export "$run" "$work/ledgers/$run.part" --state-dir "$work/state"
    mv "$work/ledgers/$run.part" "$work/ledgers/$run.jsonl"
done
"$bin/python" benchmarks/paper/fold.py "$work/ledgers" --figure "$work/figure5.png"
