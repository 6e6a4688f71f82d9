# `make demo` and `make test` are all a newcomer needs; each installs what it lacks, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test coverage check bench format clean

setup: $(VENV)/.dev
	@$(BIN)/synapse kernels build

# A virtual environment, also where Debian's python3 comes without ensurepip.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Synapse needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[native]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	@$(BIN)/synapse kernels build engine >/dev/null || echo "No native engine here: the reference answers, which is slower."
	@$(BIN)/synapse demo

# Two processes, each with whole files of tests: a third of the time is waiting.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

# Apart from `test`: on Python 3.11 the tracer of coverage can hang beside the threads of greenlet.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest --cov --cov-report=term

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/synapse kernels build --strict
	$(BIN)/python -m scripts.check_docs

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.engine

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
