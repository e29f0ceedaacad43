# The commands of users and CI. `make install` creates the environment in .venv/.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: install plan-gpu demo test test-all lint format docs bench gpu clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# XLA's compiler for NVIDIA GPUs, for `python -m train plan --topology h100:8`; needs no GPU
plan-gpu: install
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .venv/gpu-compiler \
	  jax-cuda12-pjrt==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') \
	  nvidia-cuda-nvcc-cu12==12.9.86

demo: install
	$(BIN)/python -m examples.demo.convert_and_compare
	$(BIN)/python -m examples.demo.pretrain

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not checkpoint and not gpu'

# also compiles for TPUs if libtpu is installed (pip install '.[plan]'), and for GPUs after `make plan-gpu`
test-all: install
	$(BIN)/python -m parity_tests.harness.demo_checkpoint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the documentation, as a site in site/
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

bench: install
	$(BIN)/python -m benchmarks compile decode load loss step

# On a machine with an NVIDIA GPU: its tests and benchmarks, results in benchmarks/results/. Runs in any
# environment that has JAX with CUDA, so it does not install one.
gpu:
	$(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON)) -m benchmarks gpu

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
