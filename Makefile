# make demo       install, generate data, prepare, train, evaluate (a few minutes on two cores)
# make test       install, lint, tests (at most 12 minutes on two cores)
# make test-all   the longer checks: many compiles, kill loops, studies in small
# make check-cuda compile every kernel for an H200 that is not there (4 GB of wheels, Python 3.12)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
SOURCES := ctr_jax sparsectr_jax lrea_jax laser_jax baselines_jax kernels seqvault configs benchmarks examples tests train.py eval.py
JOBS ?= 2
# Tests compile for TPUs, so the TPU compiler is installed; where there is no accelerator, JAX is not
# to look for one: it would say so at length.
ifeq ($(wildcard /dev/accel* /dev/vfio/[0-9]* /dev/nvidia0),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: demo test test-all check-cuda lint clean

$(VENV)/.installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/sparsectr_alibaba.py:demo --workdir=$(WORKDIR)
	$(BIN)/python eval.py --config=configs/sparsectr_alibaba.py:demo --workdir=$(WORKDIR)

lint: $(VENV)/.installed
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

test: lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not slow' --durations 10

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow --durations 10

# Of its own, as jax must be 0.11 or newer, which wants Python 3.12.
CUDA_PYTHON ?= python3.12
CUDA_VENV ?= .venv-cuda

check-cuda:
	test -d $(CUDA_VENV) || $(CUDA_PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet absl-py flax 'jax[cuda13]>=0.11,<0.13' nvidia-cuda-nvdisasm
	JAX_PLATFORMS=cpu $(CUDA_VENV)/bin/python -m benchmarks.check_cuda

clean:
	rm -rf $(VENV) $(CUDA_VENV) build *.egg-info runs prepared raw .pytest_cache .ruff_cache .hypothesis
