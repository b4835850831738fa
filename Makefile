# The commands of the README. Each builds .venv when it is missing or older than what defines it.
# Needs Python 3.11 or newer, make and pip. Another interpreter: make PYTHON=python3.12 test
SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.installed-docs
DEMO   ?= demo

.PHONY: help demo test test-fast test-browser docs bench bench-gpu clean

help:
	@echo 'make demo       simulate, train, analyse: a report on three states in $(DEMO)/'
	@echo 'make test       everything: notebooks and modules in step, all notebooks, pytest'
	@echo 'make test-fast  the daily part of it, under five minutes'
	@echo 'make test-browser  the site, the explorer and JupyterLab under a mouse (chromium or chrome must be there)'
	@echo 'make docs       the documentation site, from executed notebooks, in _docs/ (npm puts formulas in)'
	@echo 'make bench      the benchmarks; each prints a table'
	@echo 'make bench-gpu  throughput and whole runs on one GPU; PEER=PYTHON names an environment with cryoDRGN 4.3.1'
	@echo 'make clean      remove $(VENV) and what builds left behind'

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'recon_nb needs Python 3.11 or newer, and $(PYTHON) is not. Run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	@# Where the system's Python lacks ensurepip (Debian without python3-venv), the system's pip fills the environment.
	$(PYTHON) -m venv --clear $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs,app]'
	@touch $@

demo: $(STAMP)
	$(BIN)/recon demo -o $(DEMO)

test: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/run.sh

test-fast: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/run.sh fast

test-browser: $(DOCS)
	PATH="$(CURDIR)/$(BIN):$$PATH" MPLBACKEND=agg $(if $(wildcard _docs/index.html),RECON_NB_SITE=_docs) $(BIN)/python -m pytest tests/test_site.py tests/test_explore.py tests/test_jupyter.py -rfEs

docs: $(DOCS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/build.py $(if $(ONLY),--only $(ONLY))

bench: $(STAMP)
	@for script in $(filter-out benchmarks/bench_gpu.py,$(wildcard benchmarks/bench_*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/bench_gpu.py $(if $(PEER),--peer $(PEER)) --train --subspace -o benchmarks/results/gpu.csv

clean:
	rm -rf $(VENV) build dist *.egg-info _docs docs/_*
