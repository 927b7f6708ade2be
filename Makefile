# The whole interface. Each target sets up .venv by itself; nothing else is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(wildcard setup.py statewright/ops/csrc/*)

.PHONY: quickstart test test-slow test-versions test-versions-torch test-extras conformance \
	lint bench docs clean
.DEFAULT_GOAL := quickstart

# Of ten thousand files two thousand are ever imported: bytecode is left to the first import.
$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/.ready ## Train, write, read on and go back, on real text (TEXT=file for yours)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m statewright quickstart $(if $(TEXT),--text "$(TEXT)")

test: $(VENV)/.ready ## Everything that guards main, offline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.ready ## What takes minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-versions: $(VENV)/.ready ## Under the lowest and the newest versions that pyproject allows
	$(BIN)/python versions/run.py lowest newest

test-versions-torch: $(VENV)/.ready ## Under the newest torch that was tried (gigabytes)
	$(BIN)/python versions/run.py torch

test-extras: $(VENV)/.ready ## Every extra alone in an environment of its own (network)
	$(BIN)/python versions/run.py extras

.venv-bench/.ready: $(SOURCES) benchmarks/requirements.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e . -r benchmarks/requirements.txt
	touch $@

bench: .venv-bench/.ready $(VENV)/.ready ## Ratios to floors and peers; writes the tables of docs/speed.md
	$(BIN)/python -m pytest tests/test_native.py tests/test_ops.py
	HF_HUB_OFFLINE=1 .venv-bench/bin/python -m statewright bench \
		--output-dir benchmarks/results --page docs/speed.md

docs: $(VENV)/.ready ## Regenerate docs/check.md and the tables of docs/speed.md; the site, in build/site
	HF_HUB_OFFLINE=1 $(BIN)/python -m statewright check --all --markdown docs/check.md
	$(BIN)/python -c "from pathlib import Path; from statewright.bench.table import write_tables; \
		write_tables(Path('docs/speed.md'), Path('benchmarks/results'))"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

conformance: $(VENV)/.ready ## transformers' own tests on every mixer (fetched; see docs/conformance.md)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt parameterized
	$(BIN)/python conformance/run.py

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
