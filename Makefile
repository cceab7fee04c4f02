# make quickstart        train a small b1.58 model and its full-precision twin, pack it, generate from it (SMOKE=1: a few steps only)
# make test              every test that needs no accelerator (TESTS=tests/test_quant.py: only those)
# make test-quick        without the slow ones
# make test-huge         those that take minutes and gigabytes, and are left out of the others
# make test-native       the native kernels: compilers, sanitizers, emulated processors (NATIVE=--require-all: none may be left out)
# make test-harness      tasks of lm-evaluation-harness, for which 44 more packages (300 MB) are installed first
# make test-gpu-aot      kernels compiled for GPUs without one, by JAX's CUDA plug-in (Linux on x86-64, Python from 3.12 on)
# make test-tpu-aot      kernels and training steps compiled for TPUs without one, by libtpu (AOT_TESTS= for all named shapes: an hour)
# make lint types        style and types          make format       rewrites the files in the project's style
# make notebooks         makes the .ipynb of each notebooks/*.py anew, without outputs
# make clean             removes caches and builds          make clean-all   removes the environment and the runs as well
#
# The environment is made once, in VENV, and again when pyproject.toml or constraints.txt change.
# PYTHON=/path/to/python3 and VENV=folder choose others.

VENV ?= .venv
TESTS ?= tests
SMOKE ?=
NATIVE ?=
AOT_TESTS ?= and not slow
# Two processes are quickest on two cores; more than four do not help a suite this small. One file stays in one process, for its fixtures.
PYTEST_ARGS ?= -q -n auto --maxprocesses=4 --dist=loadfile

BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-quick test-huge test-native test-harness test-gpu-aot test-tpu-aot test-aot lint types format notebooks setup clean clean-all

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

# Without a compiler the portable kernels run, and a line says so.
quickstart: $(VENV)/.installed
	@$(BIN)/python -m bitnet_jax.cpu || true
	@$(BIN)/bitnet-jax quickstart $(if $(filter-out 0,$(SMOKE)),--smoke)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

test-quick: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow" $(TESTS)

test-huge: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -q -m huge $(TESTS)

test-native: $(VENV)/.installed-test
	@$(BIN)/python tests/cpu/check_native.py $(NATIVE)

# Other tests pass with and without these packages.
test-harness: $(VENV)/.installed-test $(VENV)/.installed-lm-eval
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/evaluation/test_harness.py tests/cli/test_eval_tasks.py

# Environments of their own, since every program of one that has libtpu or a CUDA plug-in looks for their devices first.
test-gpu-aot test-tpu-aot: test-%-aot:
	@$(MAKE) --no-print-directory VENV=$(VENV)-$* test-aot AOT=$*

test-aot: $(VENV)/.installed-test $(VENV)/.installed-$(AOT)-aot
	@$(BIN)/python -m pytest -q -m "$(AOT)_aot $(AOT_TESTS)" tests/kernels_pallas tests/planning

lint: $(VENV)/.installed-lint
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "lint: no findings"

types: $(VENV)/.installed-lint
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 PYRIGHT_PYTHON_GLOBAL_NODE=off $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-lint
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

notebooks: $(VENV)/.installed-test
	@$(BIN)/python -m tests.notebooks.pairs

setup: $(VENV)/.installed-test $(VENV)/.installed-lint

clean:
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-all: clean
	@rm -rf runs
	@for made in $(VENV) $(VENV)-gpu $(VENV)-tpu; do \
		if test -e $$made/pyvenv.cfg || test -e $$made/.unfinished; then rm -rf $$made; fi; \
	done

# --- environment -------------------------------------------------------------------------------------------------------------

# $(call install,EXTRAS) brings the environment up to date. The file .unfinished stands in it from before the first change until
# after the last, so an environment whose making was interrupted is thrown away and made anew rather than believed.
define install
@set -e; \
if test -e $(VENV) && ! test -e $(VENV)/pyvenv.cfg && ! test -e $(VENV)/.unfinished; then \
	echo "error: VENV=$(VENV) must be a virtual environment or not exist" >&2; exit 1; \
fi; \
if test -e $(VENV)/.unfinished || ! $(BIN)/python -c "" 2>/dev/null; then \
	python="$(PYTHON)"; test -n "$$python" || python=$$(sh .ci/find_python); \
	"$$python" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null \
		|| { echo "error: PYTHON=$$python must be a Python from 3.11 on that has the venv module" >&2; exit 1; }; \
	echo "Making $(VENV) with $$("$$python" -V); downloading packages takes a minute or more."; \
	rm -rf $(VENV); mkdir -p $(VENV); touch $(VENV)/.unfinished; \
	"$$python" -m venv $(VENV); \
fi; \
touch $(VENV)/.unfinished; \
$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".$(1)"; \
rm $(VENV)/.unfinished; \
touch $@
endef

$(VENV)/.installed: $(REQUIREMENTS)
	$(call install,)

$(VENV)/.installed-test: $(VENV)/.installed
	$(call install,[test])

$(VENV)/.installed-lm-eval: $(VENV)/.installed
	$(call install,[lm-eval])

$(VENV)/.installed-gpu-aot: $(VENV)/.installed
	$(call install,[gpu-aot])

$(VENV)/.installed-lint: $(VENV)/.installed
	$(call install,[lint])

$(VENV)/.installed-tpu-aot: $(VENV)/.installed
	$(call install,[tpu-aot])
