# From a fresh clone, with only Python 3.11+ and make: `make demo` or `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format proto docs clean

demo: $(VENV)/.run
	$(BIN)/expertmesh demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m cluster.server.proto.generate --check
	$(BIN)/python -m deploy.config_reference --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev
	$(BIN)/python -m cluster.server.proto.generate

docs: $(VENV)/.dev
	$(BIN)/python -m deploy.config_reference

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing expertmesh and its dependencies into $(VENV) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing development tools into $(VENV) ..."
	$(PIP) -e '.[dev]'
	@touch $@
