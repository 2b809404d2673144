# Run `make` alone for the list of targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help sweep test check golden clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' $(MAKEFILE_LIST) | awk '{printf "  make %-9s", $$1; $$1=""; print}'

sweep: .venv/sweep  ## install, then run the first sweep on the embedded data (a few minutes on 2 cores)
	$(BIN)/rrn-sweep sweeps/epsilon_grid.yaml

test: .venv/test  ## every test, with real Ray, MLflow and S3 servers on this machine
	$(BIN)/python -m pytest

check: .venv/test  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

golden: .venv/test  ## write the golden plans of the shipped sweeps anew; look at the diff
	$(BIN)/python -m pytest tests/test_sweeps.py --write-golden

clean:  ## remove .venv and caches; ./runs (checkpoints and MLflow database) stays
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/sweep: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e ".[test,check]"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "No virtual environment without Python's venv module: apt-get install python3-venv, then the same command again." >&2; exit 1; }
