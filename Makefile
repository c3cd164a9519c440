# `make demo` and `make test` do all of their own set-up; docs/build.md explains the variables.
PYTHON ?=
VENV ?= .venv
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo test test-slow lint format build bench asan clean

help:
	@echo 'make demo    train a small MoLM on real text (5 minutes), sample from it, draw its expert usage'
	@echo 'make test    build and run the tests'
	@echo 'make lint    ruff, mypy, clang-format and the layer check'
	@echo 'make bench   benchmarks against the peers; table and plots under benchmarks/results/'
	@echo 'make asan    the tests of ops and core on an AddressSanitizer and UBSan build of the CPU kernels'
	@echo 'make build   only the native extension, in place'

$(STAMP): requirements-dev.txt tools/make_venv.sh
	PYTHON='$(PYTHON)' tools/make_venv.sh '$(VENV)'
	@touch $@

# CMake decides what is out of date; unchanged sources cost a second.
build: $(STAMP)
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py -q build_ext --inplace
	@test -e $(VENV)/bin/moduleformer-ext || PATH="$(abspath $(VENV))/bin:$$PATH" \
	  $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .

demo: build
	$(PY) -m moduleformer_ext.cli demo --run runs/demo

test: build
	$(PY) -m pytest -m 'not slow'

test-slow: build
	$(PY) -m pytest -m slow

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/check_layers.py
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: build
	$(PY) -m benchmarks.run

asan: $(STAMP)
	tools/asan.sh $(PY)

clean:
	rm -rf build build-asan dist python/moduleformer_ext/*.so python/*.egg-info
