PYTHON ?= python3
VENV := .venv
# Written last, so an interrupted installation is taken up again by the next `make`.
INSTALLED := $(VENV)/.installed
RUFF := $(VENV)/bin/ruff
SOURCES := examples src tests
CHOOSE := Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ...

.DEFAULT_GOAL := help
.PHONY: help quickstart release release-check test test-lowest test-newest test-browser reliability docs quality style clean environment

help: ## Show the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-24s %s\n", $$1, $$2}'

quickstart: $(INSTALLED) ## Generate a first adapter with the released pipeline
	$(VENV)/bin/python examples/quickstart.py

release: $(INSTALLED) ## Make model_cards/mcdi-minilm-text anew: make release DATA=<folder of data sets>
	examples/reproduce/release_minilm_text.sh $(DATA)

release-check: $(INSTALLED) ## Load each release, generate, check its card; measure it again with DATA=<folder of data sets>
	$(VENV)/bin/python examples/reproduce/release_check.py $(if $(DATA),--data_root $(DATA))

test: quality docs ## Check the style and the imports, build the site, and run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-lowest test-newest: test-%: .venv-%/.installed ## Run the tests with the oldest versions that setup.cfg admits, or with the newest
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile

test-browser: $(INSTALLED) ## Try the page of examples/space in chromium
	$(VENV)/bin/python -m pytest tests/test_space.py -q

reliability: $(INSTALLED) ## Try faults and hostile inputs, and write the counts into docs/security.md
	$(VENV)/bin/python examples/reproduce/reliability.py

docs: $(INSTALLED) ## Build the site of docs/ into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --clean --site-dir build/site

quality: $(INSTALLED) ## Check the style and the imports only
	$(RUFF) check $(SOURCES)
	$(RUFF) format --check $(SOURCES)
	$(VENV)/bin/lint-imports --no-cache --no-logo

style: $(INSTALLED) ## Repair the style
	$(RUFF) check --fix $(SOURCES)
	$(RUFF) format $(SOURCES)

clean: ## Remove the environment and the caches
	rm -rf $(VENV) .venv-lowest .venv-newest build dist .pytest_cache .ruff_cache src/*.egg-info
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

# An environment that works is kept, whatever made it; a half-made one is made again.
$(INSTALLED): setup.cfg constraints.txt pyproject.toml
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(MAKE) --no-print-directory environment
	@echo "Installing mcdi_hf and the tested versions of its dependencies into $(VENV). This takes some minutes, once."
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[train,test,quality,docs,serve,space,examples]"
	@touch $@

# The two ends of docs/versions.md: pages are built and style is checked between them, in $(VENV).
.venv-lowest/.installed: constraints-lowest.txt
.venv-%/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check $(if $(filter lowest,$*),-c constraints-lowest.txt) -e ".[train,test,quality,serve,examples]"
	@touch $@

environment:
	@command -v $(PYTHON) > /dev/null || { echo "error: '$(PYTHON)' not found. $(CHOOSE)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: '$(PYTHON)' is not Python 3.11 or newer. $(CHOOSE)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
