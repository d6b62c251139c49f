# Each target works from a fresh clone: whatever it needs, `env` installs first.
PYTHON ?= python3
BIN := .venv/bin
export RAY_AUTH_MODE ?= disabled
export RAY_DEDUP_LOGS ?= 0

.PHONY: env demo test test-all check bench soak clean

env: .venv/.installed
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: env  ## the whole way on scikit-learn's digits, about 3 minutes on 2 cores
	$(BIN)/python -m jobs.prune_demo

test: env
	$(BIN)/python -m pytest -q

test-all: env
	$(BIN)/python -m pytest -q -m "slow or not slow" --timeout=1800

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

bench: env
	$(BIN)/python -m benchmarks

soak: env  ## 100,000 simulated schedules; then 15 minutes of real processes that are killed, and 30 of a whole cluster
	$(BIN)/python -m tests.simulation --seeds 100000
	$(BIN)/python -m tests.faults --minutes 15 --json docs/reliability.json
	$(BIN)/python -m tests.soak --minutes 30 --json docs/soak.json

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
