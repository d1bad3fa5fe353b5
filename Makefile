# Everything a fresh clone needs: Python >= 3.11, pip and make.
#
#   make train   a real model on the standard library's text, minutes on two CPU cores
#   make test    the CPU test suite, Triton kernels under the interpreter
PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON)),)
PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# transformers 4 beside 5: exported checkpoints must load in both
T4 := $(VENV)/transformers-4

.PHONY: train test test-parallel test-all lint aot library bench clean

train: $(VENV)/.installed
	$(BIN)/pythia-fast data quickstart --out data/quickstart
	$(BIN)/pythia-fast train configs/quickstart.toml --run $(RUN)

# two workers of one thread each, whole files: fixtures are shared within a file
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not parallel"

# every layout and schedule on 2 to 8 processes; `make test` has a sample of it
test-parallel: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parallel

test-all: $(VENV)/.installed-dev
	$(PYTEST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

aot: $(VENV)/.installed-dev
	$(BIN)/python -m pythia_fast.kernels.aot

# libpythia_kernels for one GPU and one size, and its tests; `cmake -B build` is all of them
CMAKE := $(BIN)/cmake
LIBRARY := build/library
COMPILER := $(firstword $(foreach name,$(CXX) c++ g++ clang++,$(shell command -v $(name))))
library: $(VENV)/.installed-dev
ifeq ($(COMPILER),)
	@echo "make library: skipped, there is no C++ compiler here"
else
	CXX=$(COMPILER) $(CMAKE) -S . -B $(LIBRARY) -DPYTHIA_GPUS=sm_90 -DPYTHIA_SIZES=70m \
	  -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
	$(CMAKE) --build $(LIBRARY) --parallel 2
	$(BIN)/ctest --test-dir $(LIBRARY) --output-on-failure
endif

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.suite

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("pythia-fast needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(T4) \
	  transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 \
	  requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.2 certifi idna
	touch $(VENV)/.installed $@

clean:
	rm -rf build dist _skbuild *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
