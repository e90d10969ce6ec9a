# Everything starts here: `make demo` and `make test` make their own environment, and need no step before them.
#
#   make demo       run the report on both embedded demos; ARGS="-p seeds=5" passes parameters on
#   make test       all checks, as the continuous integration runs them (under 25 minutes on 2 cores)
#   make test-all   with the slow ones
#   make benchmark  the leaderboard anew, an hour on 2 cores; after `make peers` with other libraries' code, too
#   make lab        JupyterLab with the notebooks
#   make peers      `.venv-peers`, with the libraries that ours is compared with; tests find its interpreter by ECOM_IMPORTANCE_PEERS
#   make notebooks  run every notebook, keep its outputs, export and clean
#   make readme     README.md from nbs/index.ipynb
#   make clean      remove what was built; `.venv` and `runs/` stay

SHELL := /bin/sh
.SHELLFLAGS := -euc
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough and can make an environment.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; break; }; done)

# Two OpenMP threads that spin on shared cores were measured five times slower than one: let them sleep.
export OMP_WAIT_POLICY := PASSIVE
# The models of the demos and tests come as packages; nothing is looked up on a hub.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# First and alone, so that another build of it (TORCH=torch==2.13.0+cpu, say) can be asked for.
TORCH ?= torch==2.13.0
METADATA := settings.ini setup.py pyproject.toml constraints.txt

# Two notebooks run side by side, and two files of tests, each on one core: the waiting threads of NumPy's own library cannot be told to sleep.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
TWO_FILES := --numprocesses 2 --dist loadfile

.PHONY: help demo test test-all benchmark lab peers notebooks readme clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer, with venv, is needed; none was found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp says what is installed, so that nothing is installed twice. The larger installation contains the smaller one.
$(VENV)/.demo: $(METADATA) | $(BIN)/python
	@echo "installing into $(VENV); this takes a few minutes the first time"
	$(PIP) $(TORCH)
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(METADATA) | $(BIN)/python
	@echo "installing into $(VENV); this takes a few minutes the first time"
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev,demo,peers,scale,tune,export,track]'
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo
	@mkdir -p runs
	@for demo in recommendation search; do \
		echo "$$demo:" >&2; \
		$(BIN)/ecom-importance report importance --demo $$demo $(ARGS) > runs/.demo-$$demo; \
	done
	@for demo in recommendation search; do echo; echo "$$demo"; sed 's/^/  /' runs/.demo-$$demo; done

# Cheap checks first: a notebook that was not exported is found in seconds, not after twenty minutes.
test: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_house.py
	$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2 --timing
	$(ONE_THREAD) $(BIN)/python -m pytest $(TWO_FILES) --ignore tests/test_house.py --ignore tests/test_wheel.py
	$(BIN)/python -m pytest tests/test_wheel.py

test-all: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_house.py
	$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2 --timing --flags slow
	$(ONE_THREAD) $(BIN)/python -m pytest $(TWO_FILES) -m "slow or not slow" --ignore tests/test_house.py

# The public data sets are looked for in ECOM_IMPORTANCE_DATA; those that are not there are left out, and said to be.
PEERS_PYTHON = $(or $(ECOM_IMPORTANCE_PEERS),$(wildcard $(abspath $(PEERS))/bin/python))
benchmark: $(VENV)/.demo
	$(if $(PEERS_PYTHON),ECOM_IMPORTANCE_PEERS=$(PEERS_PYTHON)) $(BIN)/ecom-importance benchmark --full --grid runs/grid --out runs/benchmark $(if $(PEERS_PYTHON),-p peers=$(abspath tests/peers/estimators.py)) $(ARGS)

lab: $(VENV)/.demo
	$(BIN)/jupyter lab nbs/index.ipynb

# The peers want another NumPy than ours, so they live beside it.
PEERS ?= $(VENV)-peers

$(PEERS)/.peers: tests/peers/requirements.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { echo "Python 3.11 or 3.12, with venv, is needed; found: $(PYTHON)" >&2; exit 1; }
	$(PYTHON) -m venv $(PEERS)
	@echo "installing into $(PEERS); this takes a few minutes the first time"
	$(PEERS)/bin/python -m pip install --quiet --quiet $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --quiet --no-deps --requirement tests/peers/requirements.txt
	@touch $@

peers: $(PEERS)/.peers
	@echo "ECOM_IMPORTANCE_PEERS=$(abspath $(PEERS))/bin/python"

# Each notebook runs in its own folder, after those that it builds on; the first that fails ends it, and is left as it was.
notebooks: $(VENV)/.test
	@find nbs -name '*.ipynb' -not -path '*/.*' | LC_ALL=C sort | while read -r notebook; do \
		echo "$$notebook"; \
		$(BIN)/nbdev_export --path "$$notebook" </dev/null; \
		$(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600 "$$notebook" </dev/null; \
	done
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tests/make_readme.py

readme: $(VENV)/.test
	$(BIN)/python tests/make_readme.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .import_linter_cache _proc _docs
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(PEERS)/*' -prune -exec rm -rf {} +
