# Run `make` alone for the list of targets.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 1
FAULTS ?= 300
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help sweep stack stack-down stack-demo test test-fast chaos check golden clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' $(MAKEFILE_LIST) | awk '{printf "  make %-11s", $$1; $$1=""; print}'

sweep: .venv/sweep  ## install, then run the first sweep on the embedded data (a few minutes on 2 cores)
	$(BIN)/rrn-sweep sweeps/epsilon_grid.yaml

stack: .venv/stack  ## PostgreSQL, MLflow, S3 and a Ray cluster of two nodes on this machine, without containers; keys in runs/stack
	$(BIN)/python -m infra.local.stack up

stack-down: .venv/stack  ## stop what `make stack` started; its data stays
	$(BIN)/python -m infra.local.stack down

stack-demo: stack  ## the first sweep on it
	set -a; . runs/stack/secrets.env; set +a; $(BIN)/rrn-sweep sweeps/epsilon_grid.yaml

test: .venv/test  ## every test, with real Ray, MLflow and S3 servers on this machine
	$(BIN)/python -m pytest -n 3 --dist loadfile

test-fast: .venv/test  ## the tests that need no server and no whole sweep: for the daily loop, under three minutes
	$(BIN)/python -m pytest -n 3 --dist loadfile --fast

chaos: .venv/test  ## a sweep under random faults must end as the undisturbed one; SEED=1 FAULTS=300 by default
	$(BIN)/python tests/chaos/chaos.py --seed $(SEED) --faults $(FAULTS)

check: .venv/test  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

golden: .venv/test  ## write golden plans, identities and the generated pages of docs/ anew; look at the diff
	$(BIN)/python -m pytest tests/plan/test_sweeps.py tests/record/test_identities.py tests/cli/test_reference.py --write-golden

clean:  ## remove .venv and caches; ./runs (checkpoints and MLflow database) stays
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/sweep: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/stack: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e ".[stack]"
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e ".[test,check]"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "No virtual environment without Python's venv module: apt-get install python3-venv, then the same command again." >&2; exit 1; }
