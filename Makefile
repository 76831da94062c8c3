# Two commands: `make speedrun` and `make test`. Both set up all they need in .venv.
# Needs Python >= 3.11, git and make. Pip's own settings (PIP_INDEX_URL, pip.conf, …) are respected.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# ARGS: flags of the job, for example  make speedrun ARGS="--run mine --depth 6"
ARGS   ?=
PYTHON ?=

.DEFAULT_GOAL := help
.PHONY: help install speedrun test lint types format clean

help: ## show this list
	@echo "MegaContext on Ray"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo '  flags of the job go into ARGS: make speedrun ARGS="--run mine"; .venv/bin/python jobs/speedrun.py --help lists them'

speedrun: $(STAMP) ## train a small model from text to report card: on this machine, or on the cluster at RAY_ADDRESS
	@$(BIN)/python -m jobs.runtime.submit -- python jobs/speedrun.py $(ARGS)

test: lint types $(STAMP) ## lint, formatting, types and all tests
	$(BIN)/python $(if $(ARGS),-m pytest $(ARGS),tests/side_by_side.py)

.PHONY: soak
soak: $(STAMP) ## the long campaigns: every test that does more with MC_SOAK=1, dozens of kills for example
	MC_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS) $$(grep -l MC_SOAK tests/test_*.py)

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict, on the library
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP) ## only make .venv and install into it

clean: ## remove .venv and caches; runs and data are kept
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made again when pyproject.toml changes.
$(STAMP): pyproject.toml
	@set -eu; \
	found=''; \
	for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 was found; python3 is: $$(python3 --version 2>&1 || true)."; \
	    echo "Install one (Debian: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "== making $(VENV) with $$("$$found" --version)"; \
	    if ! "$$found" -m venv --clear $(VENV); then \
	        rm -rf $(VENV); \
	        echo "This Python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; \
	    fi; \
	fi; \
	echo "== installing pinned packages (minutes the first time; later runs skip this)"; \
	$(BIN)/python -m pip install --quiet -e '.[ray,dev]' || { \
	    echo "The installation failed; pip's message is above. The next 'make' tries again."; exit 1; }; \
	touch $(STAMP)
