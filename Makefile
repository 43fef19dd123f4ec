# Four commands: make quickstart, make test, make lint, make bench. test-all is test and what is slow, as CI runs it; the
# gpu-* ones are the same on an accelerator; test-oldest is the suite with the oldest torch supported, in its own folder.
# PY names another interpreter (one that has the dependencies) and skips the setup: make gpu-test PY=python3
SHELL := /bin/sh
VENV_PY := .venv/bin/python
PY ?= $(VENV_PY)
DATA ?=
# more flags of quickstart: make quickstart DATA=old.txt ARGS="--encoding utf-8 cp1252"
ARGS ?=
RUN ?= runs/quickstart
JSON ?= build/artifacts/bench
# of the library, for the programs and for the tests
RUN_EXTRAS := fast,report,zstd
DEV_EXTRAS := $(RUN_EXTRAS),kernels,testing,gguf,math,curate,service
export TOKENIZERS_PARALLELISM ?= false

ifeq ($(PY),$(VENV_PY))
RUN_ENV := .venv/.run-ready
DEV_ENV := .venv/.dev-ready
endif

.PHONY: quickstart test test-all test-oldest lint bench gpu-test gpu-bench clean
quickstart: $(RUN_ENV)
	$(PY) -m experiments.quickstart --run $(RUN) $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(DEV_ENV)
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(DEV_ENV)
	$(PY) -m pytest -n 2 --dist worksteal
	$(PY) -m pytest --jaxtyping-packages=purelm.ops,purelm.models,beartype.beartype tests/ops tests/models -m "not compile" -n 2

# Triton's interpreter of that time and its numpy warn of each other.
test-oldest: .venv-oldest/.dev-ready
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -W ignore::DeprecationWarning -W ignore::UserWarning

lint: $(DEV_ENV)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(DEV_ENV)
	mkdir -p $(JSON)
	$(PY) -m experiments.bench.all --json $(JSON) $(if $(DATA),--data "$(DATA)")

gpu-test: $(DEV_ENV)
	$(PY) -m pytest tests/gpu

gpu-bench: $(DEV_ENV)
	mkdir -p $(JSON)
	$(PY) -m experiments.bench.all --device cuda --json $(JSON)

clean:
	rm -rf build/artifacts build/lib purelm.egg-info .mypy_cache .ruff_cache

.venv/.run-ready: pyproject.toml constraints.txt tools/setup_env.sh
	./tools/setup_env.sh run $(RUN_EXTRAS)
	touch $@

.venv/.dev-ready: pyproject.toml constraints.txt tools/setup_env.sh
	./tools/setup_env.sh dev $(DEV_EXTRAS)
	touch $@ .venv/.run-ready

.venv-oldest/.dev-ready: pyproject.toml constraints-oldest.txt tools/setup_env.sh
	VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt ./tools/setup_env.sh dev $(DEV_EXTRAS)
	touch $@
