# make demo | fast | test | nightly | harness | numeric | coverage | lint | lock | format | bench MODELS=DIR TEXTS=DIR | clean | distclean
# All but lock and the last two set up .venv by themselves, again after every change of pyproject or constraints.

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
.PHONY: help setup demo fast test kernels scalars vectors suite nightly harness numeric avx2 sse coverage lint style types lock format directories bench clean distclean

help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(INSTALLED)

# pip would compile 13,000 files to byte code, of which what is imported at the end needs a fifth.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bytecap needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile -c constraints.txt torch==2.13.0
	$(PIP) install --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import bytecap.pipeline.fit, numba, scipy.stats, transformers.models.llama.modeling_llama'
	touch $@

demo: $(INSTALLED)
	$(BIN)/bytecap demo

lint: style types

style: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache --no-logo
	@git log -1 --no-merges --format=%s HEAD --not --remotes 2>/dev/null | \
		awk 'length > 72 { print "over 72 characters, amend it: " $$0; exit 1 }'

types: $(INSTALLED)
	$(BIN)/mypy

# Two workers with one thread each: more threads than cores only wait for one another. Each starts with one half of the
# tests, in order, so that what the tests of a file share is made once.
fast scalars vectors suite nightly avx2 sse coverage harness: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/pytest -n 2 --dist worksteal
TIER := not nightly

# What one process has compiled the others read: workers, passes and the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

fast: $(INSTALLED)
	$(PYTEST) -m 'not slow and not nightly and not browser' --hypothesis-profile=fast

# Two workers and two passes would each compile the same kernels at the same time, so a few tests that need most of them
# come first, in two processes, with ruff in what the shorter one leaves. Then mypy and the two passes of `numeric`
# take a process each, one after the other, beside the two of the suite: no core waits for whatever ends last.
test: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 kernels style
	$(MAKE) --no-print-directory -j2 suite types $(PASSES)

kernels: scalars vectors
scalars: KERNELS := 'tests/test_blocks.py::test_threads_and_company_change_nothing[Q2_K]'
vectors: KERNELS := 'tests/test_blocks.py::test_threads_and_company_change_nothing[IQ1_S]' \
	tests/test_api.py::TestWithoutTorch::test_import_and_load
scalars vectors: $(INSTALLED)
	$(BIN)/pytest -q -p no:xdist --no-header $(KERNELS)

suite: $(INSTALLED)
	$(PYTEST) -m 'not nightly' --durations=15

# lm-eval brings some fifty packages: it has an environment of its own, which sees the other one's.
HARNESS := $(VENV)/harness
harness: $(INSTALLED)
	test -x $(HARNESS)/bin/pip || $(PYTHON) -m venv $(HARNESS)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$($(HARNESS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth
	$(HARNESS)/bin/python -m pip --disable-pip-version-check --no-input install --no-compile -c constraints.txt lm-eval==0.4.13
	$(HARNESS)/bin/python -m pytest tests/test_lm_eval.py

nightly: test coverage harness
	$(PYTEST) -m nightly --durations=15
	$(MAKE) --no-print-directory numeric TIER=nightly
	$(BIN)/python tests/mutants.py

# What a test says of floating point holds on any processor, so tests of that run again on capped instruction sets, with
# the sums of other kernels. Where the variables mean nothing they simply run again. The two passes run beside one another,
# a process each: what a process imports, compiles and fits once would be done twice by two workers. On a processor that
# has AVX2 and nothing beyond it the suite itself is the first pass, and is not run again.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell MKL_CBWR=AVX2
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott MKL_CBWR=COMPATIBLE
PASSES := $(shell grep -qw avx2 /proc/cpuinfo 2>/dev/null && ! grep -qw avx512f /proc/cpuinfo || echo avx2) sse
NUMERIC = $(BIN)/pytest -p no:xdist -m 'numeric and $(TIER)' $$(grep -l 'mark\.numeric' tests/test_*.py)
numeric: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 $(PASSES)

avx2: $(INSTALLED)
	$(AVX2) $(NUMERIC)

sse: $(INSTALLED)
	$(SSE) $(NUMERIC)

# Lines and branches of the decode path ([tool.coverage] in pyproject.toml says which folders), by the tests marked for it.
coverage: $(INSTALLED)
	mkdir -p build
	$(BIN)/coverage run -m pytest -q -p no:xdist -m 'coverage and not nightly'
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
