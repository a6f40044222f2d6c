# Every command of the README. Each makes .venv if there is none and installs what it needs.
PYTHON ?= python3
TORCH  ?= 2.13.0
TRITON ?= 3.9.0
VENV    = .venv
BIN     = $(VENV)/bin
SOURCES = pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test test-all bench gpu docs lint clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first and by version: the rest of the dependencies then leave it alone.
$(VENV)/.torch-$(TORCH): | $(VENV)/bin/python
	@echo "installing torch $(TORCH)"
	$(BIN)/pip install --quiet torch==$(TORCH)
	touch $@

$(VENV)/.train: $(SOURCES) | $(VENV)/.torch-$(TORCH)
	@echo "building vqfast"
	$(BIN)/pip install --quiet -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet triton==$(TRITON)
	$(BIN)/pip install --quiet -e '.[train,bench,test,docs]'
	touch $@

demo: $(VENV)/.train
	$(BIN)/vqfast demo --out runs/demo --overwrite

# A warning of the compilers is an error.
test test-all: export VQFAST_WERROR = 1

# One thread a worker: two workers already fill two cores. Tests about threads set their own number.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow'

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q --hypothesis-profile=default

# Minutes, on a machine that does nothing else. OPS= chooses ops, BENCH=quick is a first look.
bench: $(VENV)/.test
	$(BIN)/python -m pytest bench -q -W ignore --benchmark-columns=median,iqr,rounds --benchmark-sort=mean
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.table
	$(BIN)/python -m bench.fuzz

# On a machine with a CUDA device; needs no package index. STAGE= and OPS= choose a part.
gpu:
	$(PYTHON) bench/gpu.py

# The site, into build/docs; a warning is an error.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/docs/index.html"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info vqfast/*.so
