# Two commands matter: `make demo` and `make test`. Both set up .venv first; nothing is installed by hand.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
PYTEST := $(BIN)/python -m pytest --durations=5

# Waiting threads sleep instead of spinning: tests run several processes on few cores.
export OMP_WAIT_POLICY ?= passive

BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup demo test test-slow lint bench clean unit interpreter compile e2e packaging bench-smoke

setup: $(VENV)/.ready

# torch comes first and pinned: its headers build the extension, and a range alone could bring another build.
$(VENV)/.ready: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel "cmake>=3.25" ninja
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --no-build-isolation -e ".[train-cpu,test]"
	touch $@

demo: setup
	$(BIN)/fastuft demo

test: lint unit interpreter compile packaging e2e bench-smoke

lint: setup
	$(BIN)/ruff check fastuft kernels bench tests examples setup.py
	$(BIN)/ruff format --check fastuft kernels bench tests examples setup.py
	$(BIN)/mypy

unit: setup
	$(PYTEST) -m "not slow and not interpreter and not compile and not e2e and not packaging"

interpreter: setup
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" tests/kernels

compile: setup
	$(PYTEST) -s -m "compile and not slow" tests/kernels tests/mix

packaging: setup
	$(PYTEST) -m "packaging and not slow" tests/packaging

e2e: setup
	$(PYTEST) -m "e2e and not slow"

bench-smoke: setup
	$(PYTEST) bench --smoke

bench: setup
	$(PYTEST) bench --benchmark-only -m "not slow" --seconds 0.5

test-slow: setup
	$(PYTEST) -m "slow and not interpreter and not compile"
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and interpreter" tests/kernels

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find fastuft -name '*.so' -delete
