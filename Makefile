# `make demo` and `make test` set up everything they need; nothing else has to be run first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench soak clean

demo: $(READY)
	$(BIN)/flawmap demo -o demo

# Two processes of one thread each: on two cores that takes half the time of one process of two threads.
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/coreset.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/synthesis.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/latency.py

soak: $(READY)
	$(BIN)/python -m pytest soak

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
