# Two commands do everything on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: help install demo serve test test-slow lint types unit wheel clean

help:
	@echo "make demo   install into $(VENV) and run distill, export and bench on the embedded model"
	@echo "make serve  after make demo: student and teacher behind OpenAI's images API, and a page to try them"
	@echo "make test   install into $(VENV), lint, type-check and run the tests"
	@echo "make test-slow  proofs that take minutes: kills and damages at random, every runner against torch"
	@echo "make clean  remove $(VENV), outputs and caches"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA),dev]"
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/boostdiff distill
	$(BIN)/boostdiff export --trt
	$(BIN)/boostdiff bench --steps 20

serve: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA),dev,serve]"
	$(BIN)/boostdiff serve --teacher

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

# mypy names a package after its folder, and the clone may be called anything.
types: install
	@set -e; link=$$(mktemp -d); trap 'rm -rf "$$link"' EXIT; ln -s "$(CURDIR)" "$$link/boostdiff"; \
	cd "$$link" && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" --exclude '/(tests|build|outputs|\.venv)/' boostdiff

# A file of tests goes to one process, which makes its models once; a process a core and one more, as they wait for what
# another makes for all, each of one thread.
PROCESSES := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 3 ? n + 1 : 4)))
unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow -s

wheel: install
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
