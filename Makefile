# make setup | train | r1 | test | lint | bench | soak; ARGS="..." is passed on, PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup train r1 test lint bench soak

setup: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dsjax needs Python 3.11 or newer; name one: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint,rl]'
	touch $@

train: setup
	$(BIN)/python tools/train.py $(ARGS)

r1: setup
	$(BIN)/python tools/r1.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup
	$(BIN)/python -m tests.bench.bench_train_step
	$(BIN)/python -m tests.bench.bench_decode
	$(BIN)/python -m tests.bench.bench_fp8_step
	$(BIN)/python -m tests.bench.bench_fp8_gemm
	$(BIN)/python -m tests.bench.bench_experts
	$(BIN)/python -m tests.bench.bench_profile

soak: setup
	$(BIN)/python -m tests.soak $(ARGS)
