# Everything happens in .venv, which every target makes when it is not there. The system is left alone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test lint results small-models vqa-rad bench bench-gate bench-ingest clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## the environment (about 2 minutes)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps radlabels  # its names alone: it asks for an older torch
	touch $@

demo: $(READY)  ## two rounds on rendered radiographs, a table and a page (about 15 minutes)
	$(BIN)/python -m clincot.demo --run runs/demo $(DEMO)

test: $(READY)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

results: $(READY)  ## three seeds of everything, with intervals (SEEDS="0 1 2")
	$(BIN)/python -m clincot.results --run runs/results --seeds $(or $(SEEDS),0 1 2)

small-models: $(READY)  ## train the shipped policy and judges again from scratch (about 40 minutes)
	printf '%s\n' judge-a judge-b policy | OMP_NUM_THREADS=1 xargs -P 2 -I NAME \
		$(BIN)/clincot small-models --work runs/small-models --out runs/small-models/out --only NAME
	$(BIN)/clincot small-models --work runs/small-models --out runs/small-models/out

vqa-rad: $(READY)  ## one whole round on real VQA-RAD questions (VQA_RAD=folder of the release)
	$(BIN)/python -m clincot.demo --run runs/vqa-rad --vqa-rad $(or $(VQA_RAD),../shared/data/vqa-rad)

bench: $(READY)  ## images a second of the renderer
	OMP_NUM_THREADS=1 $(BIN)/python bench/render_rate.py

bench-gate: $(READY)  ## thousands of simulated pipelines: does the gate keep its word? (SEED=0; under 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python bench/gate_simulation.py --seed $(or $(SEED),0)

bench-ingest: $(READY)  ## memory while 100,000 rows are ingested
	OMP_NUM_THREADS=1 $(BIN)/python bench/ingest_memory.py

clean:  ## runs and caches of tools, not the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
