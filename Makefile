# `make train` and `make test` set up what they need: a .venv with the versions of constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
# The first Python of a supported version; override with `make PYTHON=/path/to/python3.11`.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
RECIPE ?= quickstart
# Of the tests; auto: as many as cores and memory serve (tests/conftest.py).
WORKERS ?= auto
# More of the command line: make train ARGS="train.max_steps=50 output.overwrite=true"
ARGS ?=

.PHONY: help setup train test test-triton lint format bench doctor clean

help:
	@echo "make train [RECIPE=quickstart] [ARGS=...]  set up, then train a recipe and report"
	@echo "make test [WORKERS=auto] [ARGS=...]        set up, then run the tests"
	@echo "make test-triton                           Triton's kernels, interpreted and compiled (248 MB more)"
	@echo "make bench RECIPE=... [ARGS=...]           measure a recipe over the backends"
	@echo "make doctor                                what is installed, what is wrong"
	@echo "make lint | format | clean"

setup: $(VENV)/.installed

# Made anew when the versions change; pip leaves alone what is right already.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: onnxruntime-training 1.19.2 has no wheels for a newer one. Get it with 'apt-get install python3.11 python3.11-venv', 'uv python install 3.11' or 'pyenv install 3.11', then: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed: apt-get install python3.11-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,qlora,inference,diffusion]'
	@# DeepSpeed has no wheels; built without its compiled operators it needs no compiler.
	DS_BUILD_OPS=0 DS_SKIP_CUDA_CHECK=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed
	@touch $@

train: setup
	$(BIN)/python launch/train.py --recipe $(RECIPE) output.overwrite=true $(ARGS)

# A file's tests stay together, as what they share is made once a file.
test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Beside the packages of .venv, not among them: nothing else needs Triton on a machine without a GPU.
test-triton: setup
	@test -d $(VENV)/triton || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton -c constraints.txt triton
	PYTHONPATH=$(CURDIR)/$(VENV)/triton HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_triton_fusion.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ort_train

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/ort-train bench $(RECIPE) $(ARGS)

doctor: setup
	$(BIN)/ort-train doctor

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
