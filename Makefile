# Every target makes the .venv it needs by itself, so `make run` and `make test` are all a fresh
# machine has to be told. Installing is repeated only when pyproject.toml or constraints.txt changed.
#
#   make test PYTHON=python3.12        another interpreter, for a .venv that is not there yet
#   make test ARGS="-k schedule -x"    arguments for pytest; likewise for `koi sine` and speed.py
#   make run PIP_FLAGS="..."           flags for pip
#
# On Linux, pip's usual torch may be a build with CUDA, some gigabytes large. Koi runs on either.
# For a CPU build, point pip at an index that has one, by PIP_FLAGS or in pip's own configuration.

PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?=

BIN := .venv/bin
# Twice quiet: errors only.
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) \
          --constraint constraints.txt --editable
# A warning is an error, but not with --quiet, which does not count what it does not print. The
# variable silences the theme's news of its successor.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PINS := pyproject.toml constraints.txt
# A process for each core; whoever is done takes tests from the others.
PARALLEL := --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test test-torch test-slow test-shard faults check format docs bench clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/.run ## Run the main job: meta-learn the paper's sine waves, then adapt to new ones
	@$(BIN)/koi sine $(ARGS)

test: .venv/.dev ## Run all tests: unit tests, doctests, documentation and examples
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# What any torch from 2.6 on is held to: the engines and all below them, eager and vectorised, and
# compiled where the compiler is known (koi.inner.compiled.torch_internals).
TORCH ?= torch
ENGINES := $(addprefix tests/test_,$(addsuffix .py,algorithms cases checkpoint_folder checkpoints \
           elementwise engines_any_optimizer engines_choice engines_chunks engines_equal \
           engines_evaluate engines_fallback engines_minibatches engines_optimizers \
           engines_recurrence evaluation frozen inner_step meta_update modules normalisation \
           optimizers outer_step parameters quadratics randomness recurrence resume roles \
           self_check storage task_kinds tasks torch_optimizer training))

test-torch: .venv/.made ## Run the engines' tests with another torch: TORCH="torch==2.6.0 torchvision"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) $(TORCH) \
		--editable . pytest pytest-timeout pytest-xdist hypothesis
	@$(BIN)/python -m pytest $(PARALLEL) $(ENGINES) $(ARGS)
	@$(BIN)/python -m pytest $(PARALLEL) -m slow tests/test_vision.py

test-slow: .venv/.dev ## Run the tests that take minutes each: every engine in full, compiled
	@$(BIN)/python -m pytest -m slow $(PARALLEL) $(ARGS)

# By how many commits came before, so that as many commits as there are shards run all of it.
SHARD ?= $(shell git rev-list --count HEAD 2>/dev/null || echo 0)

test-shard: .venv/.dev ## Run a share of the slow tests, the next one with every commit
	@$(BIN)/python -m pytest -m slow $(PARALLEL) --shard $(SHARD) $(ARGS)

faults: .venv/.dev ## Kill, cut and break trainings some thousand times, and print what was lost
	@PYTHONPATH=tests $(BIN)/python tests/faults.py

check: .venv/.dev ## Check style, formatting, types and the documentation's links
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(MKDOCS)

format: .venv/.dev ## Format the code and fix what can be fixed by itself
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

docs: .venv/.dev ## Build the documentation's site; open site/index.html
	@$(MKDOCS)

bench: .venv/.bench ## Compare speed with a hand-written loop
	@$(BIN)/python benchmarks/speed.py $(ARGS)

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments: one .venv, and a stamp file in it for each set of packages that was installed.

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Koi needs Python 3.10 or newer as '$(PYTHON)'; name another one: make PYTHON=python3.11" >&2; \
		exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made $(PINS)
	@echo "Installing Koi and its command line into .venv (a minute or two, only this once)"
	@$(INSTALL) ".[cli]"
	@touch $@

.venv/.dev: .venv/.made $(PINS)
	@echo "Installing Koi and its development tools into .venv (a minute or two, only this once)"
	@$(INSTALL) ".[dev]"
	@touch .venv/.run $@

.venv/.bench: .venv/.made $(PINS)
	@echo "Installing Koi and what it is compared with into .venv (a minute or two, only this once)"
	@$(INSTALL) ".[bench]"
	@touch $@
