# make setup | train | r1 | draw | serve | docs | test | lint | bench | bench-gpu | soak; ARGS="..." is passed on, PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup train r1 draw serve docs test lint bench bench-gpu soak

setup: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dsjax needs Python 3.11 or newer; name one: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint,rl,serve,prepare]'
	touch $@

train: setup
	$(BIN)/python tools/train.py $(ARGS)

r1: setup
	$(BIN)/python tools/r1.py $(ARGS)

draw: setup
	$(BIN)/python tools/shapes.py $(ARGS)

# The last run, or else one of about a minute.
serve: setup
	@run=$$(ls -td runs/*/checkpoints 2>/dev/null | head -n 1); \
	if [ -z "$$run" ]; then \
	  $(BIN)/python tools/train.py configs/tiny.py --workdir runs/served \
	    --set train.steps=45 train.eval_every=0 && run=runs/served/checkpoints || exit; \
	fi; \
	exec $(BIN)/python tools/serve.py "$${run%/checkpoints}" --open $(ARGS)

# docs/ as pages to open in a browser; a link that leads nowhere fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server --directory build/site"

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

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

# Every figure of one H100 or H200 in 12 minutes; PYTHON of .venv must have the extra `cuda`.
bench-gpu: setup
	$(BIN)/python -m tests.bench.bench_gpu $(ARGS)

soak: setup
	$(BIN)/python -m tests.soak $(ARGS)
