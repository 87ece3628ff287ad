# One command each; every target makes the virtual environment it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that tests run in. OpenMP's threads of several wait for each other by spinning, which on
# two busy cores takes most of the time: one each.
JOBS ?= 2
TESTING := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help demo test test-minutes test-services test-slow lint types format check bench clean

help:
	@echo "make demo       train, sample, kernel, map, report on real digits (runs/digits)"
	@echo "make test       the whole fast test suite"
	@echo "make test-minutes   the demo, kills, memory, small studies"
	@echo "make test-services  these, clusters of several hosts, S3, Slurm, schedules, notebooks"
	@echo "make test-slow  studies of minutes"
	@echo "make lint       ruff, code style and format"
	@echo "make types      mypy"
	@echo "make check      lint, types and test"
	@echo "make format     let ruff mend what it can"
	@echo "make bench      every benchmark, each printing a ratio"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lkarray needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lkarray into $(VENV) (torch is several GB the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/lkarray run digits

test: $(VENV)/.installed-test
	$(TESTING) -n $(JOBS) --dist loadgroup

test-minutes: $(VENV)/.installed-test
	$(TESTING) -m 'minutes and not slow' -n $(JOBS) --dist loadgroup --timeout 900

test-services: test-minutes
	$(TESTING) -m 'services and not slow' --timeout 900

test-slow: $(VENV)/.installed-test
	$(TESTING) -m slow --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

bench: $(VENV)/.installed-test
	@set -e; for file in $(filter-out benchmarks/measure.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
