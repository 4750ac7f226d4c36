# Everything runs in .venv, which each target that needs it makes itself. `make help` lists the targets.
#
# PROFILE   smoke | cpu | gpu | paper: how much a reproduction computes
# DATA_DIR  folder of the prepared data (default: that of tensorflow-datasets)
# SET       mnist | cifar10, and MODEL, one of experiments/recipes.py: for `make train`
# RAW       folder with the official raw files, instead of a download
# FILTERS   file of the authors' released filters, for the model rcnn_released
# WORKDIR   where runs keep their files, outside the checkout

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROFILE ?=
DATA_DIR ?=
RAW ?=
FILTERS ?=
WORKDIR ?= $(HOME)/.cache/rbf_jax/runs
export WORKDIR DATA_DIR FILTERS

# Runs a command with the process settings for CPU.
RUN := $(BIN)/python -m rbf_jax.process
# $(call reproduce,NAME) runs the pipeline of experiments/configs/NAME.py.
reproduce = $(RUN) $(BIN)/python -m experiments.reproduce --config=experiments/configs/$(1).py$(if $(PROFILE),:$(PROFILE))
# The smoke profile shows that everything runs; its numbers are not for results/.
PUBLISH := $(if $(filter smoke,$(PROFILE)),,--publish)

.PHONY: help setup quickstart test test-full lint data reproduce-mnist reproduce-cifar train tables bench docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make the environment (.venv); nothing to do when nothing changed

# PyTorch is not needed here: `make bench` installs what it compares with, and the extra `peers` what some tests do.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rbf_jax needs Python 3.11 or later, this is " + sys.version.split()[0])'
	@echo "setting up $(VENV): 1 to 3 minutes and 1.3 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)  ## the whole pipeline on 5,000 real digits in 3 to 8 minutes, with a report
	$(call reproduce,quickstart)

test: $(STAMP)  ## the default tests (8 to 15 minutes on two cores)
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $(RUN) $(BIN)/pytest -m "not full" -n 2 --dist loadgroup $(ARGS)

test-full: $(STAMP) docs  ## all tests, those that need minutes or the full data included, and the documentation
	$(RUN) $(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

lint: $(STAMP)  ## format, lint, types, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/shellcheck experiments/launch/*.sh
	$(BIN)/pytest -q tests/test_imports.py

data: $(STAMP)  ## prepare MNIST and CIFAR-10: from RAW=folder, or by download
	$(BIN)/python -m experiments.prepare_data $(if $(RAW),--raw "$(RAW)") $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

reproduce-mnist: $(STAMP) $(if $(RAW),data)  ## MNIST: filters, models, attacks, tables, report
	$(call reproduce,mnist) $(PUBLISH)

reproduce-cifar: $(STAMP) $(if $(RAW),data)  ## CIFAR-10: the same with VGG-16
	$(call reproduce,cifar10) $(PUBLISH)

train: $(STAMP)  ## one model: SET=mnist or cifar10, MODEL=cnn, rcnn, madry, ... (experiments/recipes.py)
	@[ -n "$(SET)" ] && [ -n "$(MODEL)" ] || { echo "make train needs SET=mnist or cifar10 and MODEL=, a name of experiments/recipes.py"; exit 2; }
	$(RUN) $(BIN)/python -m experiments.train --config=experiments/configs/$(SET).py$(if $(PROFILE),:$(PROFILE)) --model=$(MODEL) $(PUBLISH)

tables: $(STAMP)  ## the tables of results/, made again from what the runs left
	$(BIN)/python -m experiments.tables

bench: $(STAMP)  ## the benchmarks (results/benchmarks/*.json), after `make data`
	$(RUN) $(BIN)/python -m benchmarks.kernel
	$(RUN) $(BIN)/python -m benchmarks.conv
	$(RUN) $(BIN)/python -m benchmarks.winograd
	$(RUN) $(BIN)/python -m benchmarks.batch_norm
	$(RUN) $(BIN)/python -m benchmarks.em
	$(RUN) $(BIN)/python -m benchmarks.cost
	$(BIN)/pip install --quiet 'torch>=2.6' foolbox
	$(BIN)/pip install --quiet --no-deps torchattacks adv-lib
	$(RUN) $(BIN)/python -m benchmarks.train
	$(RUN) $(BIN)/python -m benchmarks.attacks
	$(RUN) $(BIN)/python -m benchmarks.suites

docs: $(STAMP)  ## the documentation site, in docs/_build/html; it runs the notebooks
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(RUN) $(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

clean:  ## remove the environment and what tools left behind (runs in WORKDIR stay)
	rm -rf $(VENV) build dist docs/_build docs/notebooks *.egg-info .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
