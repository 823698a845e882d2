PYTHON = .venv/bin/python

.PHONY: env test slow lint check tables

env:
	python3 -m venv .venv && $(PYTHON) -m pip install -e '.[dev]'

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m "slow or data"

lint:
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m pyright --pythonpath $(PYTHON)

check: lint test

tables:
	$(PYTHON) -m bayesae.report README.md
