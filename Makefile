# Everything a person or CI runs. Each target sets up .venv by itself: Python 3.11 or 3.12, pip and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := modeling scripts studies tests configuration docs examples

# The tests start many Pythons: without bytecode of torch and Transformers each of them compiles both anew, seconds a time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test chromium browser-test interop docs notebooks lint format figures benchmark gpu clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] < (3, 13), 'Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.12' % sys.version_info[:2]"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev,slides,train,view]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## one real region, dense, sparse and pruned: table, features, prune map
	$(BIN)/sparsepath demo

test: $(INSTALLED)  ## the whole test suite; no network, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

chromium:  ## the browser that the tests of `sparsepath view` need, where there is none and it can be installed
	command -v chromium || { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium; } || \
		echo "no chromium, and it cannot be installed (apt-get, as root): the tests say what they skip"

browser-test: $(INSTALLED) chromium  ## the tests of `sparsepath view` in headless Chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/slides/view

interop: $(INSTALLED)  ## the adapters against eva, LazySlide, slide2vec and torchao, each in an environment of its own; needs network
	$(BIN)/python scripts/interop_tests.py $(INTEROP)

docs: $(INSTALLED)  ## the pages as HTML in docs/_build/html; a broken link or reference is an error
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

notebooks: $(INSTALLED)  ## executes examples/ and keeps what they print and draw
	$(BIN)/python docs/run_notebooks.py

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

figures: $(INSTALLED)  ## pictures and tables of README, pages and model card, from what was measured
	$(BIN)/python -m studies.make_figures
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python docs/tables.py

benchmark: $(INSTALLED)  ## the README's table, measured on this machine
	$(BIN)/python scripts/benchmark.py model

gpu: $(INSTALLED)  ## needs an NVIDIA GPU: is the kernel right there, and how fast; about ten minutes, goes on where it stopped
	$(BIN)/python scripts/gpu_acceptance.py --output_dir outputs/gpu --record

clean:
	rm -rf $(VENV) .interop build dist docs/_build .pytest_cache .ruff_cache .hypothesis
