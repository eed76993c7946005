# Needs Debian (or any Linux), Python 3.11 or newer with its venv module, and make.
#   make quickstart   adapt a small vision transformer to real digits, in minutes
#   make test         format, lint, types and every test
#   make check        the same with the fast tests only
#   make docs         the documentation, as a site in build/site

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

# torchvision works with exactly one torch, so the pair comes first and pinned; what follows then
# finds its requirement met and leaves the pair alone.
TORCH := torch==2.14.1 torchvision==0.29.1
TEST_GROUPS := vision,vlm,speech,timeseries,medical,geometry3d,export,offline,sweep,docs,dev

# A stamp per set of groups and per content of pyproject.toml: install when either is new.
KEY := $(shell sha256sum pyproject.toml | cut -c1-12)
FOR_QUICKSTART := $(VENV)/.vision-$(KEY)
FOR_DOCS := $(VENV)/.docs-$(KEY)
FOR_TESTS := $(VENV)/.$(TEST_GROUPS)-$(KEY)

# Two processes of 2.5 GB share the tests.
SIDE_BY_SIDE := -n 2

.PHONY: quickstart docs test check lint format

quickstart: $(FOR_QUICKSTART)
	$(BIN)/polyadapt vision quickstart

# The variable leaves out a notice about Material's successor.
docs: $(FOR_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

check: lint
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow"

lint: $(FOR_TESTS) .link/polyadapt
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(FOR_TESTS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.%-$(KEY):
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'needs Python 3.11 or newer with venv (Debian: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

# The checkout is the package whatever its folder is called; through this link the type checker
# sees it under the package's name.
.link/polyadapt:
	mkdir -p .link
	ln -sfn .. $@
