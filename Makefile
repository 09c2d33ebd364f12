# One way to run things; CI calls the same targets.
#
#   make serve        the engine on the bundled model          make serve ARGS='model=DIR port=8080'
#   make test         the tests (make test-quick, make test-long: the unit tests only, the heavy ones)
#   make check        formatting, lint, import contracts, types
#   make bench        what the manager costs, in CPU time      make bench ARGS='mix=full quick=T'
#   make install      .venv with the package (editable) and everything above needs

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

# Several processes compute on few cores here: their OpenMP threads must sleep, not spin, while they wait.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install serve chat check format test test-quick test-long bench clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing tokasaurus and what it needs (PyTorch is the large one; about a minute)"
	@$(BIN)/python -m pip install --quiet --progress-bar on --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
	@echo "==> installed: $(BIN)/toka"

serve: install
	@echo "==> starting the engine; ask it something from another terminal: $(BIN)/toka-chat"
	@$(BIN)/toka $(ARGS)

chat: install
	@$(BIN)/toka-chat $(ARGS)

check: install
	@echo "==> ruff";        $(BIN)/ruff format --check . && $(BIN)/ruff check .
	@echo "==> imports";     $(BIN)/lint-imports
	@echo "==> mypy";        $(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	@echo "==> pytest"
	@$(BIN)/pytest $(ARGS)

test-quick: install
	@echo "==> pytest, unit tests only"
	@$(BIN)/pytest -m 'not long and not engine' $(ARGS)

test-long: install
	@echo "==> pytest, the heavy runs too"
	@$(BIN)/pytest -m 'long or not long' --timeout 3600 $(ARGS)

bench: install
	@$(BIN)/toka-bench manager $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
