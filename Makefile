# Everything from a bare clone: Python >= 3.10 and a C++ compiler on the machine.
PYTHON ?= python3
BIN := .venv/bin

PYTEST := $(BIN)/pytest -n auto

.PHONY: demo test test-all planted lint docs gpu-bundle clean

demo: .venv/installed
	$(BIN)/cosup demo $(ARGS)

test: .venv/installed
	$(PYTEST) $(ARGS)

test-all: .venv/installed
	$(PYTEST) --release $(ARGS)

planted: .venv/installed
	$(PYTEST) --planted $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed: setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "cosup needs Python 3.10 or later: make PYTHON=python3.x"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet pip==26.3
	$(BIN)/pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable ".[dev,docs,gguf]"
	$(BIN)/pip install --quiet --no-deps open_clip_torch==3.3.0  # one file of it is compared with; the rest needs torchvision
	touch $@

gpu-bundle:
	PYTHON=$(PYTHON) bench/gpu/bundle.sh

clean:
	rm -rf .venv build *.egg-info kernels/*.so
