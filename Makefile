# Everything that a developer or CI runs. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
# uv trusts the certificates of this machine too, such as a company's own.
export UV_SYSTEM_CERTS := 1
INSTALL = $(UV) pip install --quiet --python $(BIN)/python --require-hashes -r

# The command `a1111`, which runs the code of this checkout.
LINK_CLIENT = $(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .

.PHONY: help demo serve gateway test test-slow check format lint types shell bench soak image-test gpu-check pins lock clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(UV): locks/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r locks/uv.txt
	@touch $@

# What a worker needs, what the command `a1111` needs, and what a developer needs: both and more.
$(VENV)/worker: locks/worker.txt $(UV)
	$(INSTALL) $<
	@touch $@

$(VENV)/client: locks/client.txt pyproject.toml $(UV)
	$(INSTALL) $<
	$(LINK_CLIENT)
	@touch $@

$(VENV)/dev: locks/dev.txt pyproject.toml $(UV)
	$(INSTALL) $<
	$(LINK_CLIENT)
	@touch $@ $(VENV)/worker $(VENV)/client

demo: $(VENV)/worker ## one job through the real SDK and worker, against the sandbox: out/*.png
	@OUTPUT_DIR=out RUNPOD_LOG_LEVEL=WARN $(BIN)/python -m sandbox -- $(BIN)/python handler.py

serve: $(VENV)/worker ## a local endpoint (RunPod's routes) in front of the sandbox, on 127.0.0.1:8000
	@$(BIN)/python -m sandbox -- $(BIN)/python -m local_queue --port 8000 -- $(BIN)/python handler.py

gateway: $(VENV)/worker $(VENV)/client ## A1111's API in front of the sandbox's queue and a real worker, on 127.0.0.1:7860
	@$(BIN)/python -m sandbox --worker -- $(BIN)/a1111 serve --refresh $(GATEWAY_ARGS)

# Four processes on two cores: most tests wait for sockets and processes, not for the processor.
test: $(VENV)/dev ## the tests that need no long waits
	$(BIN)/pytest -n 4 -m "not slow"

test-slow: $(VENV)/dev ## the tests that need long waits
	$(BIN)/pytest -n 2 -m slow

check: format lint types test test-slow shell ## everything that CI checks

format: $(VENV)/dev
	$(BIN)/ruff format --check .

lint: $(VENV)/dev
	$(BIN)/ruff check .

types: $(VENV)/dev
	$(BIN)/mypy

shell: $(VENV)/dev
	$(BIN)/shfmt -i 2 -ci -d start.sh locks/lock.sh image/checkout.sh .ci/run
	$(BIN)/shellcheck -s bash start.sh locks/lock.sh image/checkout.sh .ci/run
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/dev ## measure what the docs say about speed
	$(BIN)/python -m benchmarks

soak: $(VENV)/dev ## ten minutes of many faults at once (SOAK_ARGS="--minutes 3")
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

image-test: $(VENV)/dev ## build the image with stand-ins for A1111, run it, break it, stop it (needs a Docker engine)
	$(BIN)/python -m tests.image $(IMAGE_ARGS)

gpu-check: $(VENV)/dev ## on a machine with a GPU: boot, switch, LoRA, out of memory, times and VRAM
	$(BIN)/python -m benchmarks.gpu_check $(GPU_ARGS)

pins: $(VENV)/dev ## fetch the files of image/pins.toml that have no SHA-256 yet, and write it there
	$(BIN)/python image/pins.py write

lock: $(UV) ## resolve everything again, at the newest versions: locks/
	UV=$(UV) locks/lock.sh pypi

clean: ## remove the environment, the demo's cache and its pictures
	rm -rf $(VENV) .sandbox out
