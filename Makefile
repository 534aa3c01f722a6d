# make install   into .venv; the others do so when needed
# make demo   install when needed, then the whole story on the embedded model (CPU, offline)
# make test   the tests, some minutes; make fast: those without processes and models; make test-all: every one
# make check  ruff and mypy      make fix   what ruff can repair
# make docs   the reference from the code, then the site in build/site
# VENV=dir uses another environment; TORCH_INDEX=url takes torch from another index (empty: the default one).

PYTHON ?= python3
VENV ?= .venv
# Without an NVIDIA driver the CPU build of torch is enough, and much smaller.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)

BIN := $(VENV)/bin
# Tests are many and small: several processes of one thread each, a file at a time.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install demo fast test rest test-all check fix docs clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/quantlab demo

fast: $(VENV)/.installed-dev
	$(PYTEST) -m fast

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not exhaustive"

rest: $(VENV)/.installed-dev
	$(PYTEST) -m exhaustive

test-all: test rest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m tools.docs.reference
	$(BIN)/python -m tools.docs.picture
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): torch first, then the rest (a few minutes)"
	$(PIP) --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis results/demo
