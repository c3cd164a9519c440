# `make demo` and `make test` do all of their own set-up; docs/build.md explains the variables.
PYTHON ?=
VENV ?= .venv
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS

# Without a GPU the emulated device alone runs the CUDA kernels, and it reads PTX: 0.3 of the compile time of all
# architectures, which `make check-cuda` builds. docs/build.md has the figures.
ifeq ($(wildcard /dev/nvidiactl),)
export MFX_CUDA_ARCHS ?= 80-virtual;90a-virtual
endif

# PY=python3 takes an environment that exists, installs nothing there, and says what it lacks.
ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
else
PY_GIVEN := $(PY)
override PY := $(shell '$(PY_GIVEN)' -c 'import sys; print(sys.executable)' 2>/dev/null)
ifeq ($(PY),)
$(error PY=$(PY_GIVEN) is no Python)
endif
STAMP := what-is-there
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
export PATH := $(abspath $(dir $(PY))):$(PATH)
EVERYTHING := build/.everything
# What `make test` runs on an emulated Hopper, too; `make check-cuda` runs everything there.
HOPPER_TESTS := tests/cuda/test_grouped_gemm_rounds_cuda.py tests/cuda/test_grouped_gemm_cuda.py \
  tests/cuda/test_stick_attention_hopper_cuda.py tests/cuda/test_stick_attention_cuda.py \
  tests/cuda/test_stick_attention_hopper_wide_cuda.py tests/cuda/test_stick_attention_wide_cuda.py

.PHONY: help demo test test-slow test-emulated test-gpu sanitize-gpu bench-gpu gpu-proof docs check-torch check-cuda cuda-roofline experiments lint format build extension bench asan fuzz clean

help:
	@echo 'make demo    train a small MoLM on real text (5 minutes), sample from it, draw its expert usage'
	@echo 'make test    build and run the tests'
	@echo 'make test-gpu    the tests of the CUDA kernels on the GPU of this machine'
	@echo 'make bench-gpu   the CUDA kernels against the peers that are installed, on the GPU of this machine'
	@echo 'make sanitize-gpu  the tests under compute-sanitizer'
	@echo 'make gpu-proof   tests, sanitizer and benchmarks in nine minutes; results under OUT'
	@echo 'make check-cuda  ptxas for every architecture and the emulator at length, no GPU needed'
	@echo 'make check-torch  build and test with the lowest and the highest torch that is served'
	@echo 'make lint    ruff, mypy, clang-format, the checks of layers and of documentation'
	@echo 'make docs    the documentation as a site, build/site/index.html'
	@echo 'make bench   benchmarks against the peers; table and plots under benchmarks/results/; BENCH="--budget 600 -k ffn"'
	@echo 'make experiments  the experiments of the paper in small; tables and pictures under benchmarks/results/experiments/'
	@echo 'make fuzz    thousands of calls of the ops with arguments that may be anything'
	@echo 'make asan    the tests of ops and core on an AddressSanitizer and UBSan build of the CPU kernels'
	@echo 'make build   only the native extension, in place'

ifeq ($(STAMP),what-is-there)
.PHONY: what-is-there
NEEDS := runtime test
lint format: NEEDS := lint
docs: NEEDS := runtime docs hf
bench: NEEDS := runtime bench
test-gpu sanitize-gpu bench-gpu gpu-proof: NEEDS := test
what-is-there:
	@$(PY) tools/missing_packages.py build $(NEEDS)
else
# One that was copied here with its folder is made anew.
ifneq ($(filter-out $(realpath $(VENV)),$(file <$(VENV)/.made-by-make_venv)),)
.PHONY: $(STAMP)
endif

$(STAMP): requirements-dev.txt tools/make_venv.sh
	PYTHON='$(PYTHON)' tools/make_venv.sh '$(VENV)'
	@touch $@
endif

# CMake decides what is out of date; unchanged sources cost a second.
extension:
	@$(PY) setup.py -q build_ext --inplace
	@$(if $(MFX_NATIVE),,mkdir -p $(dir $(EVERYTHING)) && touch $(EVERYTHING))

build: $(STAMP)
	@$(MAKE) --no-print-directory extension
ifneq ($(STAMP),what-is-there)
	@test -e $(VENV)/bin/moduleformer-ext || \
	  $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
endif

# Until everything has been built, only what this machine runs: the demo begins minutes earlier.
demo: $(STAMP)
	@$(MAKE) --no-print-directory build $(if $(wildcard $(EVERYTHING)),,MFX_NATIVE=1)
	$(PY) -m moduleformer_ext.cli demo --run runs/demo

# Most tests are one thread's work: a process per core.
test: build
	$(PY) -m pytest -m 'not slow' -n '$(MAX_JOBS)'
	@$(MAKE) --no-print-directory test-emulated

# The emulator's own tests, then those of the CUDA kernels on it; skipped where there is no nvcc.
test-emulated: build
	$(MAKE) --no-print-directory -C tools/cudasim check PYTHON='$(abspath $(PY))'
	tools/emulated.sh $(PY)
	CUDASIM_ARCH=90 tools/emulated.sh $(PY) $(HOPPER_TESTS)

test-gpu: build
	@$(PY) -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "test-gpu: this torch sees no GPU")'
	$(PY) -m pytest @tests/cuda_tests.args

sanitize-gpu: build
	tools/sanitize_gpu.sh $(PY)

# BENCH is what `python -m benchmarks --help` explains, and options of pytest.
bench-gpu: build
	$(PY) -m benchmarks --device cuda $(BENCH)

# Everything of the three above that fits into nine minutes, from a build of its own; works on a bare machine.
gpu-proof: $(STAMP)
	tools/gpu_proof.sh $(PY) '$(or $(OUT),build/gpu-proof-results)'

# The lowest and the highest torch that the package serves, each in an environment of its own.
check-torch:
	tools/check_torch.sh

# A model of the steady state of the CUDA kernels' main loops, docs/cuda_roofline.md, from SASS and the emulated device.
cuda-roofline: build
	$(PY) tools/cuda_roofline.py

check-cuda: build
	tools/check_cuda.sh $(PY)

test-slow: build
	$(PY) -m pytest -m slow

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/check_layers.py
	$(PY) tools/check_docs.py
	git ls-files '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

# A link that leads nowhere, a page in no list of docs/index.md, a public name on no page: warnings, and so errors.
docs: build
	$(PY) -m sphinx -q -W --keep-going -c docs -b html . build/site

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

bench: build
	$(PY) -m benchmarks $(BENCH)

# The paper's experiments, an hour or two on two cores; what has been done is found again.
experiments: build
	for name in language_modelling length distribution continual pruning efficiency; do \
	  $(PY) -m benchmarks.experiments.$$name || exit 1; done

fuzz: build
	$(PY) tests/fuzz/fuzz.py --cases 20000

asan: $(STAMP)
	tools/asan.sh $(PY)

clean:
	rm -rf build tools/cudasim/build build-asan build-ptxas dist python/moduleformer_ext/*.so python/*.egg-info
