# make demo · make demo-scratch · make test · make check · make docs: each makes its own .venv, may run again at once.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-scratch test lint check format docs results-lock

demo: .venv/installed
	$(BIN)/python scripts/demo.py

demo-scratch: .venv/installed
	$(BIN)/python scripts/demo_scratch.py

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder  # the order of tests/conftest.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

docs: .venv/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html; with search: $(BIN)/python -m http.server -d build/site"

# after numbers were meant to change: make results-lock WHY="the reason", which CHANGELOG.md gets too
results-lock: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fakes/results_lock.py --why "$(WHY)"

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: setup.cfg pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@
