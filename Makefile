# Two commands on a fresh machine: make train, make test. Each makes .venv first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock

.PHONY: train test check bench docs setup clean
.DEFAULT_GOAL := help

help:
	@echo "make train [ARGS=\"algo=sft peft=lora\"]   set up and train"
	@echo "make test  [ARGS=\"-k packing\"]           set up and run the tests"
	@echo "make check                               lint, format, types"
	@echo "make bench                               benchmarks against TRL"
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

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	@touch $@

setup: $(VENV)/.base

train: $(VENV)/.base
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python bench/sft.py
	for algo in reward dpo kto; do $(BIN)/python bench/preference.py $$algo || exit 1; done

docs: $(VENV)/.docs
	$(BIN)/python -m hydratune.option_tables > docs/options.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV)
