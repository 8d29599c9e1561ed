# The two commands of this project, `make train` and `make test`, from a fresh clone. Each makes the
# environment it needs with Python's own venv and pip. Any Python from 3.12 on will do:
#   make test PYTHON=/path/to/python3

VENV ?= .venv
LATEST ?= .venv-latest
PYTHON ?=
CONFIG ?= configs/tiny_cpu.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
WORKERS ?= 2
# LLVM's optimisations would take a third of the tests' time, most of which is compilation.
PYTEST = -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
FAST_COMPILE = XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS"
PIP = -m pip install --quiet --disable-pip-version-check

# A name on the path is no proof of a working interpreter (version managers leave stubs), so each
# candidate has to run and say that it is new enough.
FIND_PYTHON = for python in $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python); do \
	  "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	    && break; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "nsa_jax needs Python 3.12 or newer with its venv module; tried:" \
	    "$(or $(PYTHON),python3.12 python3.13 python3.14 python3 python)." >&2; \
	  echo "Install one (Debian and Ubuntu: apt install python3.12-venv), or name it:" \
	    "make $@ PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi

.PHONY: train test test-latest lint help

help:
	@echo "make train        train the small language model of $(CONFIG) into $(WORKDIR)"
	@echo "make test         run the tests with the pinned versions of constraints.txt"
	@echo "make test-latest  run them with the newest versions that pyproject.toml admits"
	@echo "make lint         check style with ruff"

train: $(VENV)/ready
	$(VENV)/bin/nsa-train --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(VENV)/ready
	$(FAST_COMPILE) $(VENV)/bin/python $(PYTEST)

# Resolves anew at each run: what is newest changes. What takes long and depends least on other
# packages is left to the pinned versions.
UNCHANGED = tests/triton tests/mosaic_gpu tests/experiments tests/ops/properties_test.py tests/ops/xla_test.py
test-latest: $(LATEST)/ready
	@$(LATEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(FAST_COMPILE) $(LATEST)/bin/python $(PYTEST) $(addprefix --ignore=,$(UNCHANGED))

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) ..."
	@$(FIND_PYTHON); "$$python" -m venv --clear $(VENV)
	@$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(LATEST)/ready: pyproject.toml
	@echo "Setting up $(LATEST) ..."
	@$(FIND_PYTHON); "$$python" -m venv --clear $(LATEST)
	@touch $@
