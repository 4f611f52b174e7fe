# Every target sets up .venv by itself, once; it is brought up to date when pyproject.toml changes.
# Another interpreter: make PYTHON=python3.13 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Two workers of one thread each, on half of the tests in their order, for a file's tests may share
# what they made; who is done first takes over half of what the other one has left.
PARALLEL := OMP_NUM_THREADS=1
WORKERS := -n 2 --dist worksteal
LAW := $(sort $(wildcard benchmarks/*.py))
PARTS ?= product_cost top_eigenvalue slq_cost density_error memory report_cost tracking scaling compiled_products
BENCH_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check docs bench bench-law slow
.NOTPARALLEL:  # two installations must not meet in one .venv
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed  ## install, then train a small network whose learning rate is measured
	$(BIN)/batchlr train configs/demo/digits_vgg.yaml --out runs/demo

test: $(VENV)/.installed-dev  ## install with the development tools, then run the tests
	$(PARALLEL) $(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

check: $(VENV)/.installed-dev  ## lint, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs  ## build the documentation in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(VENV)/.installed-bench  ## curvature beside other libraries; one part: make bench PARTS=product_cost
	@set -e; for part in $(PARTS); do echo "== $$part"; \
	  $(BIN)/python "benchmarks/curvature/$$part.py" $(BENCH_ARGS); done

bench-law: $(VENV)/.installed-dev  ## run the scripts of benchmarks/ on the learning rates themselves: hours
	@set -e; for script in $(LAW); do echo "== $$script"; $(BIN)/python "$$script"; done

slow: $(VENV)/.installed-dev  ## run the tests that take more than ten seconds each
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# A stamp is the last thing its recipe writes, so an interrupted installation is taken up again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "batchlr needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-bench: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install -e '.[dev,bench]'
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@
