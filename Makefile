# make demo    install into .venv, fetch the model, answer examples/prompts.jsonl
# make test    lint, type check, tests
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Touched when everything is installed, so that it is done again only when the requirements change.
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint install clean

demo: install
	$(BIN)/fineserve-jax fetch smollm2-135m
	$(BIN)/fineserve-jax batch --model smollm2-135m -i examples/prompts.jsonl -o answers.jsonl --overwrite
	$(BIN)/python examples/show_answers.py examples/prompts.jsonl answers.jsonl

test: lint
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; install one, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) answers.jsonl
