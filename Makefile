# Two commands matter: `make demo` and `make test`. Both set up .venv first; nothing is installed by hand.
# TORCH and TRITON choose another pair: make test TORCH=torch==2.11.0 TRITON=triton==3.6.0

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTEST := $(BIN)/python -m pytest --durations=5
# Tests that time nothing share the cores: a file to a worker, one thread each.
WORKERS  ?= 2
PARALLEL := env OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS)
EXCLUDED := not slow and not peers and not docs and not browser

# The newest pair, with torch's CUDA build, which other projects' packages expect; in an environment of its own.
MORE        := .venv-more
MORE_TORCH  ?= torch==2.14.1
MORE_TRITON ?= triton==3.8.0
MORE_PEERS  := torchvision timm transformers accelerate lightning pyarrow datasets onnx onnxscript onnxruntime \
               "moto[server]" kubeflow-training kubernetes-validate
MORE_PAGES  := "playwright>=1.48" axe-playwright-python
MORE_PYTEST := $(MORE)/bin/python -m pytest --durations=5

# Waiting threads sleep instead of spinning: tests run several processes on few cores.
export OMP_WAIT_POLICY ?= passive

BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup docs demo test test-more test-slow lint bench clean unit interpreter compile e2e packaging bench-smoke

setup: $(VENV)/.ready

# torch and Triton come first and pinned: torch's headers build the extension, and a range alone could bring another build.
$(VENV)/.ready: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel "cmake>=3.25" ninja
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TRITON)"
	$(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e ".[train-cpu,test]"
	touch $@

demo: setup
	$(BIN)/fastuft demo

test: lint unit interpreter compile packaging e2e bench-smoke

lint: setup
	$(BIN)/ruff check fastuft kernels bench tests examples docs setup.py
	$(BIN)/ruff format --check fastuft kernels bench tests examples docs setup.py
	$(BIN)/mypy
	$(BIN)/codespell fastuft kernels csrc bench tests examples docs *.md

unit: setup
	$(PARALLEL) --dist loadfile -m "$(EXCLUDED) and not interpreter and not compile and not e2e and not packaging"

interpreter: setup
	TRITON_INTERPRET=1 $(PARALLEL) -m "interpreter and not slow" tests/kernels

compile: setup
	$(PYTEST) -s -m "compile and not slow" tests/kernels tests/mix

packaging: setup
	$(PYTEST) -m "packaging and not slow" tests/packaging

e2e: setup
	$(PYTEST) -m "e2e and $(EXCLUDED)"

docs: $(MORE)/.ready
	$(MORE)/bin/python -m sphinx -W --keep-going -b html docs docs/_build

bench-smoke: setup
	$(PYTEST) bench --smoke

bench: setup
	$(PYTEST) bench --benchmark-only -m "not slow" --seconds 0.5

test-slow: setup
	$(PYTEST) -m "slow and not interpreter and not compile and not peers and not docs and not browser"
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and interpreter" tests/kernels

$(MORE)/.ready: $(BUILD_INPUTS)
	test -x $(MORE)/bin/python || $(PYTHON) -m venv $(MORE)
	$(MORE)/bin/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel "cmake>=3.25" ninja
	$(MORE)/bin/python -m pip install --quiet "$(MORE_TORCH)" "$(MORE_TRITON)" $(MORE_PEERS) $(MORE_PAGES)
	$(MORE)/bin/python -m pip install --quiet "jsonargparse[signatures]==4.49.0" --target $(MORE)/oldest
	$(MORE)/bin/python -m pip install --no-build-isolation -e ".[train-cpu,test,docs]"
	test -n "$$FASTUFT_CHROMIUM" || $(MORE)/bin/python -m playwright install --only-shell chromium
	touch $@

# What `make test` leaves out: other packages' networks and loops, the newest torch and Triton, the oldest parser, the
# documentation and its notebook, pages in a browser.
test-more: $(MORE)/.ready
	$(MORE_PYTEST) -m "peers and not slow"
	$(MORE_PYTEST) -m "$(EXCLUDED) and not interpreter and not compile and not e2e and not packaging" \
	    tests/kernels tests/loss tests/mix tests/model tests/trainer
	TRITON_INTERPRET=1 $(MORE_PYTEST) -m "interpreter and not slow" tests/kernels
	$(MORE_PYTEST) -s -m "compile and not slow" tests/kernels tests/mix
	PYTHONPATH=$(MORE)/oldest $(MORE_PYTEST) -m "not e2e" tests/cli
	$(MORE_PYTEST) -m "docs or browser"

clean:
	rm -rf $(VENV) $(MORE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find fastuft -name '*.so' -delete
