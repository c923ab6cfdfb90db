# `make demo` and `make test` need nothing but Python ≥ 3.11 and pip: each builds .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test check fmt clean gpu-check gpu-tests gpu-packages
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"himoe needs Python 3.11 or newer, {sys.executable} is {v}; say which to use: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## train a Hi-MoE language model on text this machine already has, about 5 minutes
	$(BIN)/himoe train

test: $(READY)   ## prove the layer, the data, the trainer and the command line
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90

check: $(READY)  ## static checks: style, types, the import rule
	$(BIN)/ruff format --check src tests examples
	$(BIN)/ruff check src tests examples
	$(BIN)/pyright
	$(BIN)/lint-imports

fmt: $(READY)
	$(BIN)/ruff format src tests examples
	$(BIN)/ruff check --fix src tests examples

# A machine with a GPU may have a Python of its own and no network. What its Python lacks comes along in .gpu-packages.
GPU_PYTHON  ?= python3
GPU_VERSION ?= 3.12
GPU_WORKERS ?= 8
GPU_RUN      = PYTHONPATH=src:.gpu-packages $(GPU_PYTHON)

gpu-check: gpu-tests  ## on a machine with a CUDA GPU, no network needed: the tests marked gpu, then the benchmark
	$(GPU_RUN) -m himoe bench layer --device cuda

gpu-tests:
	$(GPU_RUN) tests/gpu_machine.py
	$(GPU_RUN) -m pytest -m gpu -n $(GPU_WORKERS) -p no:cacheprovider tests/kernels tests/nn

gpu-packages:    ## where there is a network: fetch what the command line needs, for the Python of the GPU machine
	python3 -m pip install --quiet --disable-pip-version-check -c constraints.txt --target .gpu-packages --upgrade \
		--only-binary :all: --python-version $(GPU_VERSION) --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		$$(python3 tests/gpu_machine.py --packages)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage .hypothesis
