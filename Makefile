SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install vllm-env quickstart test test-vllm check lint unit docs fuzz compatibility engines reliability benchmarks format clean

VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# cpu or gpu: which build of vLLM
VLLM_KIND ?= cpu
PYTHON := $(VENV)/bin/python
TINY := output/tiny/qwen3_moe
# Arguments: overrides of the quickstart (make quickstart ARGS="seed=7 max_steps=5"), names of benchmarks, --write
ARGS ?=
# Most tests wait for processes more than they compute. The tests of a file share processes, so a file stays on one
# worker. Files run in the order of their names: the long ones come before the short ones
TEST_PROCESSES ?= 2
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## create or update .venv (CPU)
	@docker/install.sh cpu $(VENV)

vllm-env: ## create or update .venv-vllm, the environment of the vLLM rollout (GPUs: VLLM_KIND=gpu; minutes)
	@docker/install-vllm.sh $(VLLM_KIND) $(VLLM_VENV)

quickstart: install ## train a tiny MoE model with router replay on this machine
	@if [[ ! -f $(TINY)/config.json ]]; then \
	    echo "== making the tiny checkpoint $(TINY)"; \
	    $(PYTHON) -m roll_r3.data.tiny_task --output $(TINY); \
	fi
	@echo "== training: python -m roll_r3.run --config configs/quickstart.yaml $(ARGS)"
	@$(PYTHON) -m roll_r3.run --config configs/quickstart.yaml $(ARGS)

test: install ## run the tests, also with real engines, except vLLM and long tests
	@echo "== tests, $(TEST_PROCESSES) files at a time"
	@$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "not vllm and not long" --ignore tests/benchmarks
	@echo "== budgets of replay, run alone"
	@$(PYTHON) -m pytest tests/benchmarks

test-vllm: install vllm-env ## run the tests against a real vLLM server (minutes)
	@echo "== the tests of the vLLM rollout"
	@VLLM_PYTHON=$(VLLM_VENV)/bin/python $(PYTHON) -m pytest -m vllm

check: lint unit ## format, lint, types, import rules, generated docs, unit tests

lint: install
	@echo "== format"
	@$(PYTHON) -m ruff format --check .
	@echo "== lint"
	@$(PYTHON) -m ruff check .
	@echo "== types"
	@$(PYTHON) -m mypy
	@echo "== import rules"
	@$(VENV)/bin/lint-imports
	@echo "== generated docs"
	@$(PYTHON) -m roll_r3.config.docs --check
	@$(PYTHON) -m roll_r3.config.schema --check
	@$(PYTHON) -m roll_r3.preflight.rule_pages --check
	@$(PYTHON) -m roll_r3.from_roll --check
	@$(PYTHON) -m roll_r3.tracking.names --check
	@$(PYTHON) -m docs.packages --check

unit: install
	@echo "== unit tests"
	@$(PYTHON) -m pytest $(SIDE_BY_SIDE) tests/unit

docs: install ## write the generated pages, the diagram of the packages, and the schema for editors
	@$(PYTHON) -m roll_r3.config.docs
	@$(PYTHON) -m roll_r3.config.schema
	@$(PYTHON) -m roll_r3.preflight.rule_pages
	@$(PYTHON) -m roll_r3.from_roll
	@$(PYTHON) -m roll_r3.tracking.names
	@$(PYTHON) -m docs.packages

fuzz: install ## test all readers of external data with hostile inputs; ARGS="--inputs 10000" (a quarter of an hour)
	@$(PYTHON) tests/fuzz $(ARGS)

compatibility: install ## run the matrix of layouts and write docs/compatibility.md (minutes)
	@$(PYTHON) -m pytest tests/integration/test_megatron_matrix.py --write-compatibility

engines: install vllm-env ## run every rollout with every trainer and write docs/engines.md (an hour)
	@VLLM_PYTHON=$(VLLM_VENV)/bin/python $(PYTHON) -m pytest -s -k for_the_page tests/integration/test_pairs.py --write-engines

reliability: install ## run the fault tests, also the long ones, and write docs/reliability.md (an hour; vLLM if its environment exists)
	@$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "fault or long" --write-reliability

benchmarks: install ## measure the cost of replay; ARGS=--write writes docs/performance.md (half an hour)
	@$(PYTHON) -m examples.benchmarks $(ARGS)

format: install ## format the code and apply ruff's fixes
	@$(PYTHON) -m ruff check --fix --exit-zero .
	@$(PYTHON) -m ruff format .

clean: ## remove caches and build leftovers; keep .venv and output
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find roll_r3 tests -name __pycache__ -prune -exec rm -rf {} +
	@echo "removed caches; .venv and output are still there"
