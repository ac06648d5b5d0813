# make demo   environment, torch, build, the tutorial and a quick benchmark
# make test   the same environment, then the whole test suite
# make gpu    builds, tests and measures on an NVIDIA GPU, with the torch that PYTHON has
#
# TORCH is what pip is asked for: one release, since the library is built for one release line.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# A compiler is assumed here: a build that fails is an error, not a fallback.
CNNKERNELS_BUILD ?= require
PYTEST_ARGS ?=
DEMO_OUT ?= out
GPU_OUT ?= out/gpu
GPU_ARGS ?=

export CNNKERNELS_BUILD
# The environment is used without being activated.
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One stamp for each value of TORCH: another torch makes another environment.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
INSTALL_STAMP := $(VENV)/.installed
CONSTRAINT := $(VENV)/torch-constraint.txt

CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu*')
CXX_TEST_FILES := $(foreach kind,h cpp cuh,$(wildcard tests/kernels/*.$(kind) tests/cuda_kernels/*.$(kind)))
BUILD_FILES := $(CXX_FILES) setup.py pyproject.toml $(wildcard build_backend/*.py)

.PHONY: help demo test gpu lint format build wheel clean

help:
	@sed -n '/^# make/s/^# //p' Makefile
	@echo 'make lint   ruff, mypy and clang-format    make format  rewrites the files that lint names'
	@echo 'make build  the package, editable, in $(VENV)    make wheel   dist/*.whl'
	@echo 'make clean  removes what these commands made'

demo: build
	$(BIN)/python -m cnnkernels info
	$(BIN)/python -m cnnkernels tutorial --out $(DEMO_OUT)
	$(BIN)/python -m cnnkernels bench --quick

test: build
	$(BIN)/python -m cnnkernels info
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# No environment is made and no package index asked: torch for CUDA is large, and where it is
# installed it belongs to the driver that is there.
gpu:
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("torch") is None)' || { echo 'make gpu needs an NVIDIA GPU, a CUDA build of torch and nvcc;' \
	  'missing here: torch, which $(PYTHON) cannot import; choose another with make gpu PYTHON=...' >&2; exit 2; }
	$(PYTHON) -m benchmarks.gpu.run --out $(GPU_OUT) $(GPU_ARGS)

lint: $(INSTALL_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(CXX_TEST_FILES)

format: $(INSTALL_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES) $(CXX_TEST_FILES)

build: $(INSTALL_STAMP)

wheel: $(TORCH_STAMP)
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f cnnkernels/_C.* cnnkernels/_build_info.json
	find . -name __pycache__ -prune -exec rm -rf {} +

$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo '$(PYTHON) is not a Python 3.10 or newer; choose one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'Python cannot make virtual environments: on Debian and Ubuntu, install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  > $(CONSTRAINT)
	touch $@

# The constraint keeps what is installed here from replacing torch.
$(INSTALL_STAMP): $(TORCH_STAMP) $(BUILD_FILES)
	$(PIP) install --constraint $(CONSTRAINT) --editable '.[test,dev,examples]'
	touch $@
