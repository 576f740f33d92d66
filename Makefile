# make demo: the whole pipeline on this machine.   make test: the tests.   make check: everything that CI runs but the demo.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test check lint bench clean

demo: $(INSTALLED)
	$(BIN)/elastic run infra/recipes/tiny.yaml

test: $(INSTALLED)
	$(BIN)/pytest -m "not gpu and not benchmark"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict elastic_core
	$(BIN)/lint-imports

check: lint test

bench: $(INSTALLED)
	$(BIN)/pytest -m "benchmark and not gpu" -s tests/benchmarks

clean:
	rm -rf $(VENV) .elastic build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
