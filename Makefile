# Two commands from a bare machine: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-slow check format bench docs clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml tests/alone.txt
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps -r tests/alone.txt
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[bench,demo]'
	@touch $@

demo: $(VENV)/.demo ## fine-tune SmolLM2-135M on Python's documentation: perplexity before and after
	$(BIN)/python examples/demo/run.py

test: $(VENV)/.dev ## the tests
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

$(VENV)/.gptq: $(VENV)/.dev # it asks for a later torch than ours, and runs with it
	$(PIP) --no-deps -r tests/gptq.txt
	@touch $@

test-slow: $(VENV)/.gptq ## the tests that take long
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow tests; status=$$?; [ $$status -eq 5 ] || exit $$status

check: $(VENV)/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## bring all files into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench ## measure, side by side with PEFT
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.train

docs: $(VENV)/.dev ## bring the generated pages up to date
	$(BIN)/veneer methods --markdown > docs/methods.md

clean: ## remove what was made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info
