# Everything a newcomer, a developer and CI run. `make help` lists it; needs make and Python >= 3.11, nothing else.

VENV  ?= .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BEGUN := $(VENV)/.unfinished
OURS  := pyproject.toml constraints.txt constraints-torch.txt

# The first interpreter that really starts: version managers leave shims on PATH that do not.
# 3.11 and 3.12 first: they get the embedded Redis as a wheel; later ones need redis-server on PATH.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

INSTALL := -c constraints.txt -c constraints-torch.txt -e '.[local,operator,dev]'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check check-chart crds images dist slow bench bench-cluster clean FORCE

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 13

venv: $(STAMP) ## make or refresh .venv (PYTHON=python3.12 to choose the interpreter)

# An environment whose interpreter is gone, or that was made in another folder, is not up to date.
ifneq ($(shell $(PY) -c pass 2>/dev/null && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

# Made anew when an earlier attempt was cut off, when pip does not start, or when the checkout moved;
# otherwise what changed in the pins is installed into the environment that is there.
$(STAMP): $(OURS)
	@if [ -e $(BEGUN) ] || ! $(PY) -m pip --version >/dev/null 2>&1 \
		|| { [ -e $@ ] && [ "$$(cat $@)" != "$(CURDIR)" ]; }; then \
		[ -n "$(PYTHON)" ] || { echo "no Python >= 3.11 on PATH; install one, or: make venv PYTHON=/path/to/python" >&2; exit 1; }; \
		echo "making $(VENV) with $$($(PYTHON) --version)"; \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); \
	fi
	@touch $(BEGUN)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv \
		|| echo "uv is not to be had here; pip does the work, slower"
	@$(VENV)/bin/uv pip install --quiet --python $(PY) $(INSTALL) \
		|| $(PY) -m pip install --quiet --disable-pip-version-check $(INSTALL)
	@printf %s "$(CURDIR)" > $@ && rm -f $(BEGUN)

demo: venv ## tune on 1,797 scanned digits: environment, data, one local run, leaderboard
	@$(PY) examples/digits/prepare.py
	@$(VENV)/bin/qtt run examples/digits/tuningrun.yaml $(DEMO_FLAGS)

test: venv ## the CPU test suite, no network
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal $(PYTEST_FLAGS)

check: venv ## lint, format, types, import rules, drift
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(PY) -m pytest -q tests/packaging/test_drift.py

check-chart: venv ## the Helm chart: lint, schemas, refused values, its alerts; a part of make test
	@tests/chart/prometheus.sh || echo "no Prometheus to be had here; the tests of alerts and dashboards are left out"
	@$(PY) -m pytest -q tests/chart $(PYTEST_FLAGS)

crds: venv ## write the CRD, the chart's copy and version and the tables of docs/manifest.md from the code
	@$(PY) -m qtt_operator.crd > crds/quicktune.dev_tuningruns.yaml
	@cp crds/quicktune.dev_tuningruns.yaml helm/quicktune-operator/files/
	@sed -i -E "s/^(version|appVersion): [^ ]+/\1: $(VERSION)/" helm/quicktune-operator/Chart.yaml
	@$(PY) docs/manifest_tables.py

# One source of the version: the package. `make images REGISTRY=registry.example/ ENGINE=podman`.
VERSION  = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' qtt_core/__init__.py)
ENGINE   ?= docker
REGISTRY ?=
LABELS   = --build-arg VERSION=$(VERSION) --build-arg GIT=$$(git rev-parse --short HEAD)

images: ## both images, named after the version (ENGINE, REGISTRY, IMAGE_FLAGS)
	$(ENGINE) build -f operator/Dockerfile -t $(REGISTRY)quicktune-operator:$(VERSION) $(LABELS) $(IMAGE_FLAGS) .
	$(ENGINE) build -f trainer_image/Dockerfile -t $(REGISTRY)quicktune-trainer:$(VERSION) $(LABELS) $(IMAGE_FLAGS) .

dist: venv ## dist/: wheel, sources, chart, install.yaml, SBOM, checksums (REGISTRY: where the images are)
	@$(PY) release/dist.py --registry "$(REGISTRY)"

# A cluster with four GPUs that only the scheduler counts, our images, and a log of every request.
CLUSTER := $(PY) tests/testbed/cluster.py run --resource nvidia.com/gpu=4 --audit

testbed: venv ## the end-to-end tests, in a Kubernetes that they boot; needs Linux, root and Go
	@$(PY) tests/testbed/machine.py
	@tests/chart/prometheus.sh || echo "no Prometheus to be had here; the test of dashboards and alerts is left out"
	@images=$$($(PY) tests/testbed/images.py) && $(CLUSTER) --nodes 2 --image $$images -- \
		tests/testbed/run_tests.sh $(PY) $(PYTEST_FLAGS)

e2e: ## that cluster, the chart, a run to a model, Prometheus, upgrade and rollback, uninstall
	@$(MAKE) --no-print-directory testbed PYTEST_FLAGS="-k 'test_chart or observability' $(PYTEST_FLAGS)"

cluster: venv ## a shell in the same cluster, operator installed; it ends with the shell
	@$(PY) tests/testbed/machine.py
	@images=$$($(PY) tests/testbed/images.py) && $(CLUSTER) --image $$images -- tests/testbed/shell.sh $(CLUSTER_COMMAND)

slow: venv ## the tests that take minutes of CPU
	@$(PY) -m pytest -q -m slow $(PYTEST_FLAGS)

campaign: venv ## go on with the campaign of random faults: a shard in tests/campaign, the tally (CAMPAIGN_FLAGS)
	@OMP_NUM_THREADS=1 $(PY) -m tests.cluster.campaign $(CAMPAIGN_FLAGS)

bench: venv ## the figures of the README: the demo's limits, our overhead, Quick-Tune against random
	@$(PY) benchmarks/demo.py
	@$(PY) benchmarks/overhead.py
	@$(PY) benchmarks/cold_step.py
	@$(PY) benchmarks/quicktune_vs_random.py

bench-cluster: venv ## the figures of the operator, busy and idle; needs Linux, root and Go
	@$(PY) tests/testbed/machine.py
	@$(PY) benchmarks/cluster_throughput.py
	@$(PY) benchmarks/cluster_scale.py
	@$(PY) benchmarks/cluster_failover.py
	@$(PY) benchmarks/cluster_idle.py

clean: ## remove what the other targets made
	@rm -rf $(VENV) .quicktune/digits examples/digits/digits benchmarks/out build dist *.egg-info \
		.pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
