#: make train [CONFIG=mnist5k_lenet300] [ARGS="--seeds 5"]   train networks
#: make test [ARGS="-k normalize"]    run the linters, then the tests
#: make lint         check formatting, lint rules and types
#: make bench        measure the speed; ARGS are passed on
#: make notebooks    run every notebook, and check the .ipynb beside it
#:
#: Each needs Python >= 3.11 and installs the rest into .venv by itself.
#: PYTHON=python3.13 selects another interpreter (the default is python3).

PYTHON ?= python3
CONFIG ?= mnist5k_lenet300
ARGS ?=

.PHONY: help train test lint bench notebooks
.NOTPARALLEL:  # two pips must not write to one .venv

help:
	@sed -n 's/^#: \{0,1\}//p' Makefile

# Without it, pyright asks for a newer pyright on the internet at each start.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

# What .venv is made of, as two short names: the interpreter with the folder, and
# the project's metadata. The empty files that say "done" carry them in their own
# names, so that contents decide and not times, which git and copying change. They
# are made last: an interrupted installation leaves none, and the next call repairs.
MADE_BY := $(shell "$(PYTHON)" -c 'import os, sys, zlib; \
  seen = repr((sys.version, sys.base_prefix, os.getcwd())).encode(); \
  print(zlib.crc32(seen)) if sys.version_info >= (3, 11) else None' 2>/dev/null)
PROJECT := $(firstword $(shell cksum pyproject.toml))
INTERPRETER := .venv/.done-interpreter-$(MADE_BY)
EXPERIMENTS := .venv/.done-experiments-$(MADE_BY)-$(PROJECT)
EVERYTHING := .venv/.done-everything-$(MADE_BY)-$(PROJECT)

# -qq: errors only. A second set of extras is added to the first, never a fight.
install = .venv/bin/python -m pip install -qq --disable-pip-version-check -e

$(INTERPRETER):
	@test "$(MADE_BY)" || { echo "$(PYTHON): expected Python >= 3.11, but it is" \
	  "missing or older; name one, as in make PYTHON=python3.13" >&2; exit 1; }
	@echo "Making .venv; that and the installation take a minute or two."
	@rm -f .venv/.done-*
	@"$(PYTHON)" -m venv --clear .venv
	@touch $@

# For what runs experiments.
$(EXPERIMENTS): $(INTERPRETER)
	@echo "Installing scl_jax[experiments] into .venv."
	@rm -f .venv/.done-e*
	@$(install) '.[experiments]'
	@touch $@

# For what checks the project.
$(EVERYTHING): $(INTERPRETER)
	@echo "Installing scl_jax[experiments,notebooks,test,dev] into .venv."
	@rm -f .venv/.done-e*
	@$(install) '.[experiments,notebooks,test,dev]'
	@touch $(EXPERIMENTS) $@

train: $(EXPERIMENTS)
	.venv/bin/python -m experiments.main $(CONFIG) $(ARGS)

bench: $(EXPERIMENTS)
	.venv/bin/python -m experiments.bench $(ARGS)

lint: $(EVERYTHING)
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m pyright --pythonpath .venv/bin/python

# More than 8 processes cost more memory and start-up than they save time.
test: lint
	.venv/bin/python -m pytest -n auto --maxprocesses 8 $(ARGS)

notebooks: $(EVERYTHING)
	.venv/bin/python -m experiments.notebooks
