# Two commands on a fresh machine: make train, make test. Each makes .venv first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock

.PHONY: train test test-gpu check bench bench-gpu dashboard docs setup clean
.DEFAULT_GOAL := help

help:
	@echo "make train [ARGS=\"algo=sft peft=lora\"]   set up and train"
	@echo "make test  [ARGS=\"-k packing\"]           set up and run the tests"
	@echo "make test-gpu                            the tests of numbers on a CUDA device"
	@echo "make dashboard [ARGS=\"--port 8081\"]     set up and browse studies and runs on 127.0.0.1"
	@echo "make check                               lint, format, types"
	@echo "make bench                               benchmarks against TRL, on a CPU; takes long"
	@echo "make bench-gpu                           the same on a GPU, with models of 0.5 to 8 billion parameters"
	@echo "make docs                                the documents as a site, in build/site"

# torch alone first: its pinned version is then there when the other packages ask for any torch
$(VENV)/.base: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e ".[dev,bench]"
	@touch $@

$(VENV)/.dashboard: $(VENV)/.base
	$(PIP) -e ".[dashboard]"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	@touch $@

setup: $(VENV)/.base

train: $(VENV)/.base
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-gpu: $(VENV)/.dev
	HYDRATUNE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/unit/test_on_a_device.py $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python bench/suite.py cpu $(ARGS)

bench-gpu: $(VENV)/.dev
	$(BIN)/python bench/suite.py gpu $(ARGS)

dashboard: $(VENV)/.dashboard
	$(BIN)/hydratune dashboard $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m hydratune.option_tables > docs/options.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV)
