# make demo | test | nightly | coverage | lint | lock | format | bench MODELS=DIR TEXTS=DIR | clean | distclean
# demo, test, nightly, coverage, lint and bench set up .venv by themselves, again after every change of pyproject or constraints.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# For `make bench`: which of targets, ablation, calibration, coding and speed, on what, written where (results/ holds
# the committed runs).
BENCH ?= targets ablation
MODELS ?=
TEXTS ?=
BENCHFLAGS ?=
BENCHDIR ?= build/bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test nightly coverage lint lock format directories bench clean distclean

help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bytecap needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/bytecap demo

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Two workers with one thread each: more threads than cores only wait for one another.
test nightly coverage: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/pytest -n 2 -m 'not nightly'

nightly: test coverage
	$(BIN)/pytest -n 2 -m nightly
	$(BIN)/python tests/mutants.py

# Lines and branches of the decode path ([tool.coverage] in pyproject.toml says which modules), by the tests meant for it
# without the slowest.
COVERING := afterwards bands code codebooks coders container corners entropy estimates hostile integers layers ledger packed \
	reference sidefiles streams units
SLOW := seconds or real_artifact or memory_for or guided or demo or stranger or endless or kmeans or distortion_falls \
	or slack or many_lanes or very_different or changed_byte or more_is_noticed or any_integers_in or random_artifacts or other_methods
coverage: $(INSTALLED)
	mkdir -p build
	$(BIN)/coverage run -m pytest -q -p no:xdist -m 'not nightly' -k 'not ($(SLOW))' \
		$(COVERING:%=tests/test_%.py) src/bytecap/sizes.py src/bytecap/format/entropy/frequencies.py src/bytecap/format/codefiles.py
	$(BIN)/coverage report

# Hashes of all distributions of what constraints.txt pins; needs uv (https://docs.astral.sh/uv).
LOCK := requirements-dev.txt
lock:
	@printf '%s\n' \
		'# Hashes of every distribution of the versions in constraints.txt, made from it by `make lock`; not edited by hand.' \
		'# Use: pip install --require-hashes --no-deps -r $(LOCK), after torch and before pip install --no-deps -e .' \
		'# torch is left out: its builds (CPU, CUDA) come from different indexes or from a local file, each with its own hash.' \
		> $(LOCK).tmp
	grep -v -e '^torch==' constraints.txt | uv pip compile - --quiet --no-deps --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header >> $(LOCK).tmp
	mv $(LOCK).tmp $(LOCK)

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

directories:
	@test -d "$(MODELS)" && test -d "$(TEXTS)" || \
		{ echo "usage: make bench MODELS=DIR TEXTS=DIR [BENCH='targets ablation'] [BENCHFLAGS=...]" >&2; exit 1; }

bench: directories $(INSTALLED)
	mkdir -p $(BENCHDIR)
	@set -e; for name in $(BENCH); do \
		echo "== $$name"; \
		$(BIN)/python benchmarks/$$name.py --models "$(MODELS)" --texts "$(TEXTS)" --output $(BENCHDIR)/$$name.jsonl \
			$(BENCHFLAGS); \
	done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.bcap
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
