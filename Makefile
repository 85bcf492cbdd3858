# Everything that a developer or CI runs. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help demo serve test test-slow check format lint types shell bench soak image-test gpu-check clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt
	@touch $@

demo: $(VENV)/installed ## one job through the real SDK and worker, against the sandbox: out/*.png
	@OUTPUT_DIR=out RUNPOD_LOG_LEVEL=WARN $(BIN)/python -m sandbox -- $(BIN)/python handler.py

serve: $(VENV)/installed ## the SDK's local API in front of the sandbox, on 127.0.0.1:8000
	@$(BIN)/python -m sandbox -- $(BIN)/python handler.py --rp_serve_api

# Four processes on two cores: most tests wait for sockets and processes, not for the processor.
test: $(VENV)/installed ## the tests that need no long waits
	$(BIN)/pytest -n 4 -m "not slow"

test-slow: $(VENV)/installed ## the tests that need long waits
	$(BIN)/pytest -n 2 -m slow

check: format lint types test test-slow shell ## everything that CI checks

format: $(VENV)/installed
	$(BIN)/ruff format --check .

lint: $(VENV)/installed
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

shell: $(VENV)/installed
	$(BIN)/shfmt -i 2 -ci -d start.sh .ci/run
	$(BIN)/shellcheck start.sh .ci/run
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/installed ## measure what the docs say about speed
	$(BIN)/python -m benchmarks

soak: $(VENV)/installed ## ten minutes of many faults at once (SOAK_ARGS="--minutes 3")
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

image-test: $(VENV)/installed ## build the image with stand-ins for A1111, run it, break it, stop it (needs a Docker engine)
	$(BIN)/python -m tests.image $(IMAGE_ARGS)

gpu-check: $(VENV)/installed ## on a machine with a GPU: boot, switch, LoRA, out of memory, times and VRAM
	$(BIN)/python -m benchmarks.gpu_check $(GPU_ARGS)

clean: ## remove the environment, the demo's cache and its pictures
	rm -rf $(VENV) .sandbox out
