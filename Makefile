# `make demo` shows the whole idea; `make test` is what CI runs. Both set up .venv first.
# On Linux, PyPI's torch wheel brings CUDA: PIP_ARGS (or PIP_EXTRA_INDEX_URL) points pip to a CPU build.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-all lint clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  -c constraints.txt -e ".[train,serve,trt-rtx,dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/skipvision demo -o demo --force

# Two files at a time, each on one thread: these models are too small to share one among two.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Every family, text model, type and size, and the C++ runtime under sanitizers: about an hour.
test-all: lint
	SKIPVISION_ALL_TESTS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/tensorrt_stubs.py build/typings
	$(BIN)/mypy

clean:
	rm -rf .venv demo build
