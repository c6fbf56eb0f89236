# The commands of a working copy. `make demo` and `make test` make .venv themselves where it is missing.
# On a machine without an NVIDIA GPU take PyTorch's CPU build, which is ten times smaller:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

# What the mixers are measured on: tiny Shakespeare where it is there.
TEXT ?= $(firstword $(wildcard $(EVERLONG_TEST_DATA)/text/tinyshakespeare.txt ../shared/data/text/tinyshakespeare.txt) python-stdlib)
ORACLES := fla-core flash-pytorch linformer mambapy performer-pytorch rwkv torchscale \
	axial-positional-embedding hyper-connections local-attention rotary-embedding-torch torch-einops-utils
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := .venv/bin/pip --disable-pip-version-check --quiet
BIN := .venv/bin

.PHONY: demo test test-all check fmt bench clean

demo: .venv/core.stamp
	$(BIN)/everlong demo

test: .venv/dev.stamp
	$(BIN)/pytest -q -n 2

test-all: .venv/dev.stamp
	$(BIN)/pytest -q -n 2 --slow

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layout.py

fmt: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.stamp
	$(BIN)/everlong bench ops --store
	$(BIN)/everlong bench mixers --data $(TEXT) --store
	$(BIN)/everlong bench train --store
	$(BIN)/everlong bench decode --store

clean:
	rm -rf .venv runs

.venv/core.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e .
	touch $@

# What mixers and operators are compared with. Most of what these packages need themselves is for GPUs, or is here already.
.venv/dev.stamp: .venv/core.stamp
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps $(ORACLES)
	touch $@
