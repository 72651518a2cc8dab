# Two commands matter: `make demo` and `make test`. Both set up what they need (.venv, pinned packages, and as
# root on Debian the few system packages that are missing). `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.moetier-ready
READY_TEST := $(VENV)/.moetier-ready-test
CONFIG ?=
MODEL :=

.PHONY: help demo smol serve test test-all lint types check lm-eval bench gpu-check clean

help:
	@echo "make demo       set-up if needed, then the whole path once: compress, serve, ask, table, shut down"
	@echo "                (MODEL=mini or smol chooses the model; without, smol-moe when it is there)"
	@echo "make smol       fetch 93 MB and assemble smol-moe, a model of real pretrained weights, in the cache"
	@echo "make serve      the same cluster, kept up until Ctrl-C (CONFIG=cluster.yaml for your own)"
	@echo "make test       set-up if needed, lint, types, then the tests that need under 15 minutes on 2 cores"
	@echo "make test-all   everything, with the slow tests"
	@echo "make lm-eval    install lm-evaluation-harness (600 MB), for moetier eval --tasks"
	@echo "make bench      the CPU benchmarks; rows go to benchmarks/results/"
	@echo "make gpu-check  every Triton kernel and a one-process run on a real GPU; report in benchmarks/results/gpu/"
	@echo "make clean      remove the environment and the caches of this folder"

demo: $(READY)
	@$(BIN)/moetier demo $(if $(MODEL),--model $(MODEL))

smol: $(READY)
	@$(BIN)/moetier fetch smol-moe

serve: $(READY)
	@$(BIN)/moetier serve $(if $(CONFIG),--config $(CONFIG))

test: $(READY_TEST) lint types
	$(BIN)/python -m pytest -q -m "not slow"

test-all: $(READY_TEST) lint types
	$(BIN)/python -m pytest -q

lint: $(READY_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY_TEST)
	$(BIN)/mypy

check: lint types

# 36 packages, 600 MB: for `moetier eval --tasks` and its tests, which are skipped without it.
lm-eval: $(READY_TEST)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[lm-eval]'

bench: $(READY)
	$(BIN)/python -m benchmarks.families
	$(BIN)/python -m benchmarks.placement
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.overheads
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.prefetch
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.governor
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.codecs
	$(BIN)/python -m benchmarks.transports

# Runs with the Python that is there (PYTHON=...), because a GPU machine brings its own torch.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

$(READY): pyproject.toml constraints.txt setup.py $(wildcard kernels/native/*) .ci/setup
	@bash .ci/setup run "$(PYTHON)" "$(VENV)"
	@touch $@

$(READY_TEST): $(READY)
	@bash .ci/setup test "$(PYTHON)" "$(VENV)"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .moetier .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kernels -name '_native*.so' -delete
