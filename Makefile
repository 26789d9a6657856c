# What each target is for, and how long it takes on two cores once everything is installed:
#
# make demo       fetch the model, answer examples/prompts.jsonl
# make lint       style and types
# make test-fast  the host's side, which compiles nothing: scheduler, KV books, simulator, readers, options; under a minute
# make docs       the pages of docs/ and the API pages, in build/docs; needs no network
# make test       lint, and all tests but the slow ones; 8 minutes
# make test-slow  what takes minutes by itself, most of it with the real model
# make test-next  tests of kernels, steps and tokens with the newest JAX that pyproject.toml allows, on Python 3.12
# make aot        compile the kernels for GPUs and TPUs, which need not be there, and write docs/aot.md; 2 minutes if none
#                 has changed, 14 if all have
# make environments  install what test-next and aot need beside .venv; 3 minutes
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Touched when everything is installed, so that it is done again only when the requirements change.
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast test-slow test-next lint docs aot install environments clean

demo: install
	$(BIN)/fineserve-jax fetch smollm2-135m
	$(BIN)/fineserve-jax batch --model smollm2-135m -i examples/prompts.jsonl -o answers.jsonl --overwrite
	$(BIN)/python examples/show_answers.py examples/prompts.jsonl answers.jsonl

# A file's tests stay in one process, since they share compiled programs.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

test-fast: install
	$(BIN)/python -m pytest --fast -n auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# JAX 0.11 and later want Python 3.12. A name on the PATH may be a stub that fails, so each is asked for its version.
NEXT_PYTHON = $(shell for p in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python python3 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

# What a newer JAX can change: kernels, programs, tokens. The host's side has been tested.
NEXT_TESTS := tests/pallas_kernels tests/runner \
	$(addprefix tests/engine/test_,engine.py huggingface_tokens.py kernels.py windows.py warm_up.py tensor_parallel.py)

test-next:
	@if [ -z "$(NEXT_PYTHON)" ]; then echo "test-next: SKIPPED, no Python 3.12 or newer was found"; \
	else $(MAKE) PYTHON=$(NEXT_PYTHON) .venv-next/.installed && \
	.venv-next/bin/python -c 'import jax; print("test-next: JAX", jax.__version__)' && \
	.venv-next/bin/python -m pytest -n auto --dist loadfile $(NEXT_TESTS); fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build

# AOT_OPTIONS=--all compiles also what has not changed since benchmarks/aot/saved was written, AOT_OPTIONS="--only ragged"
# looks at some of the cases, AOT_OPTIONS=--full at more of them than CI does. Commit what it writes.
# Each platform has an environment of its own: with two device plugins in one, every start of JAX tries both.
aot: .venv-aot-gpu/.installed .venv-aot-tpu/.installed
	.venv-aot-gpu/bin/python -m benchmarks.aot gpu $(AOT_OPTIONS) & gpu=$$!; \
	.venv-aot-tpu/bin/python -m benchmarks.aot tpu $(AOT_OPTIONS); tpu=$$?; \
	wait $$gpu && exit $$tpu
	.venv-aot-gpu/bin/python -m benchmarks.aot.mesh gpu
	.venv-aot-tpu/bin/python -m benchmarks.aot.mesh tpu
	.venv-aot-gpu/bin/python -m benchmarks.aot report

.venv-aot-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-aot-$*
	.venv-aot-$*/bin/python -m pip install -e '.[aot-$*]'
	@touch $@

.venv-next/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install -e '.[dev]'
	@touch $@

install: $(INSTALLED)

environments: .venv-aot-gpu/.installed .venv-aot-tpu/.installed
	@if [ -n "$(NEXT_PYTHON)" ]; then $(MAKE) PYTHON=$(NEXT_PYTHON) .venv-next/.installed; fi

$(INSTALLED): pyproject.toml setup.py $(wildcard pallas_kernels/cpu/src/*)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; install one, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-next .venv-aot-gpu .venv-aot-tpu build/docs answers.jsonl
