# `make train` and `make test` are all that a newcomer needs; `make help` lists the rest.
# The environment is made in .venv, and made again when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
CUDA ?= 13# the CUDA version whose CuPy the tests install: 12 or 13
BIN := $(VENV)/bin
# `make test-gpu RUN=python3` uses an interpreter that has everything already.
RUN ?= $(BIN)/python

.PHONY: help train test test-gpu bench lint wheel-check clean

help:
	@echo "make train        train on handwritten digits; results in runs/digits"
	@echo "make test         run all tests that need no GPU"
	@echo "make test-gpu     run the tests on a GPU (CUDA=12 for CUDA 12; SANITIZERS=all takes"
	@echo "                  the kernels through every tool of compute-sanitizer: minutes more)"
	@echo "make bench        run the benchmarks (SUITES='steps ops' PEERS=torch,jax for a part, with peers)"
	@echo "make lint         ruff and mypy"
	@echo "make wheel-check  build the wheel, install it elsewhere, use it there"

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	@touch $@

$(VENV)/.test-cuda$(CUDA): $(VENV)/.base
	$(BIN)/python -m pip install --quiet --group test --group test-cuda$(CUDA)
	@touch $@

# A machine with a driver alone has neither cuBLAS nor CUDA's compiler: the extra brings them.
$(VENV)/.gpu-cuda$(CUDA): $(VENV)/.test-cuda$(CUDA)
	$(BIN)/python -m pip install --quiet --editable ".[cuda$(CUDA)]"
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --group lint --group test
	@touch $@

ifeq ($(RUN),$(BIN)/python)
TESTS_READY := $(VENV)/.test-cuda$(CUDA)
GPU_READY := $(VENV)/.gpu-cuda$(CUDA)
endif

train: $(VENV)/.base
	$(BIN)/tapegrad train --data digits --hidden 256 128 --dropout 0.3 --batch-size 32 --epochs 60

test: $(TESTS_READY)
	$(RUN) -m pytest -m "not gpu"

test-gpu: $(GPU_READY)
	TAPEGRAD_BACKEND=cupy TAPEGRAD_SANITIZERS=$(SANITIZERS) $(RUN) -m pytest tests/gpu

bench: $(TESTS_READY)
	$(RUN) -m benchmarks $(SUITES) $(if $(PEERS),--peers $(PEERS))

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tapegrad

wheel-check: $(VENV)/.base
	$(RUN) tests/wheel_check.py

clean:
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .ruff_cache .hypothesis
