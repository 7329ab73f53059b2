# make demo     set up, compress a small video model, and write a report
# make test     the tests that need no GPU
# make check    lint, format, types, import rules
# make setup    make or refresh .venv; the targets above do this by themselves

PYTHON ?= python3
# Optional parts of pyproject.toml to install; add deepspeed for ZeRO-3 replicas. `make test` adds what only tests need.
EXTRAS ?= application,dev
# Three processes (many tests wait for others), to which tests/conftest.py deals out modules in their order. For a single process: make test PYTEST_ARGS=
PYTEST_ARGS ?= -n 3 --dist loadgroup --no-loadscope-reorder
# The run directory that configs/demo.yaml names.
DEMO_RUN ?= runs/demo

BIN := .venv/bin

.PHONY: demo test check format setup clean

demo: setup
	@$(BIN)/python -m pipeline run configs/demo.yaml
	@echo "report: $(DEMO_RUN)/report.html"

test: EXTRAS := $(EXTRAS),tests
test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup:
	@$(PYTHON) tools/setup_environment.py --extras $(EXTRAS)

clean:
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
