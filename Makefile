# make demo    install into .venv, fetch the model, answer examples/prompts.jsonl
# make test    lint, type check, tests
# make aot     compile the kernels for GPUs and TPUs, which need not be there, and write docs/aot.md
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Touched when everything is installed, so that it is done again only when the requirements change.
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint aot install clean

demo: install
	$(BIN)/fineserve-jax fetch smollm2-135m
	$(BIN)/fineserve-jax batch --model smollm2-135m -i examples/prompts.jsonl -o answers.jsonl --overwrite
	$(BIN)/python examples/show_answers.py examples/prompts.jsonl answers.jsonl

# A file's tests stay in one process, since they share compiled programs.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# AOT_OPTIONS="--only ragged" compiles some of the cases, AOT_OPTIONS=--full more of them than CI does.
# Each platform has an environment of its own: with two device plugins in one, every start of JAX tries both.
aot: .venv-aot-gpu/.installed .venv-aot-tpu/.installed
	.venv-aot-gpu/bin/python -m benchmarks.aot gpu $(AOT_OPTIONS) & gpu=$$!; \
	.venv-aot-tpu/bin/python -m benchmarks.aot tpu $(AOT_OPTIONS); tpu=$$?; \
	wait $$gpu && exit $$tpu
	.venv-aot-gpu/bin/python -m benchmarks.aot report

.venv-aot-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-aot-$*
	.venv-aot-$*/bin/python -m pip install -e '.[aot-$*]'
	@touch $@

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; install one, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-aot-gpu .venv-aot-tpu build/aot answers.jsonl
