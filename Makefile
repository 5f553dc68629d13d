# Everything a person or CI runs. Each target sets up .venv by itself: Python 3.11 or 3.12, pip and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := modeling scripts studies tests configuration

.PHONY: demo test lint format figures benchmark gpu clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] < (3, 13), 'Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.12' % sys.version_info[:2]"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev,slides,train]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## one real region, dense, sparse and pruned: table, features, prune map
	$(BIN)/sparsepath demo

test: $(INSTALLED)  ## the whole test suite; no network, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

figures: $(INSTALLED)  ## the pictures of README and model card
	$(BIN)/python -m studies.make_figures

benchmark: $(INSTALLED)  ## the README's table, measured on this machine
	$(BIN)/python scripts/benchmark.py model

gpu: $(INSTALLED)  ## needs an NVIDIA GPU: is the kernel right there, and how fast; about ten minutes, goes on where it stopped
	$(BIN)/python scripts/gpu_acceptance.py --output_dir outputs/gpu --record

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
