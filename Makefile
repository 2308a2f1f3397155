# `make` or `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment is made again when one of these changes.
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-16s %s\n", $$1, $$2 }'

.PHONY: setup
setup: $(INSTALLED) ## Make the environment in .venv, from a hash-locked file

$(INSTALLED): config/requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo '1/4  $(VENV): an empty environment'
	@$(PYTHON) -m venv --clear $(VENV)
	@echo '2/4  uv, to install the rest faster'
	@sed -n '/^uv==/,/[^\\]$$/p' config/requirements-dev.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement $(VENV)/uv.lock
	@echo '3/4  the packages of config/requirements-dev.lock'
	@# pip, where only its own configuration leads to an index.
	@$(BIN)/uv pip install --python $(BIN)/python --require-hashes --requirement config/requirements-dev.lock || \
		$(BIN)/python -m pip install --require-hashes --requirement config/requirements-dev.lock
	@echo '4/4  Tidemark itself, from this directory'
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	@touch $@

.PHONY: demo
demo: setup ## Run the whole pipeline for 20 s and check its invariants (ARGS="--keep" stays up)
	$(BIN)/python -m tests.demo $(ARGS)

.PHONY: check
check: setup ## Format, lint, types, layers
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.PHONY: test
test: check ## All checks and all tests that need nothing but this repository
	$(PYTEST) --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: coverage
coverage: check ## The same tests, with the branch coverage of all processes, and its floor
	mkdir -p build/coverage && $(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.PHONY: test-unit
test-unit: setup ## The tests that need no server
	$(PYTEST) tests/unit $(ARGS)

.PHONY: test-model
test-model: setup ## The model, and the fuzzing of all that takes arguments, by other examples than `make test` (EXAMPLES=2000)
	TIDEMARK_TEST_EXAMPLES=$(or $(EXAMPLES),2000) $(PYTEST) --timeout 0 tests/integration/test_model.py \
		tests/integration/test_fuzz.py tests/integration/test_fuzz_programs.py $(ARGS)

.PHONY: test-browser
test-browser: setup ## Flower in headless Chromium (Debian: apt-get install chromium)
	$(PYTEST) -m browser tests/acceptance $(ARGS)

.PHONY: test-rabbitmq
test-rabbitmq: setup ## The acceptance tests on RabbitMQ (Debian: apt-get install rabbitmq-server)
	$(PYTEST) -m rabbitmq tests/acceptance $(ARGS)

.PHONY: test-tls
test-tls: setup ## Postgres over TLS (Debian: apt-get install postgresql; the wheel's has no TLS)
	TIDEMARK_TEST_POSTGRES_BIN=$${TIDEMARK_TEST_POSTGRES_BIN:-$$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -1)} \
		$(PYTEST) -m tls tests/acceptance $(ARGS)

.PHONY: test-hints
test-hints: setup ## The plans under hints (Debian 13: apt-get install postgresql-17-pg-hint-plan)
	$(PYTEST) -m hints tests/integration $(ARGS)

.PHONY: test-docker
test-docker: setup ## The acceptance tests over containers (needs a Docker engine)
	$(PYTEST) -m docker tests/docker $(ARGS)

.PHONY: test-upstream
test-upstream: setup ## Whether the defect of Celery that tasks/programs.py works around is still there
	$(PYTEST) -m upstream tests/acceptance $(ARGS)

.PHONY: test-faults
test-faults: setup ## All faults to the running system, three times (ARGS="--rounds 50", ARGS="--seed N --only ...")
	$(BIN)/python -m tests.faults --rounds 3 $(ARGS)

.PHONY: soak
soak: setup ## Load and random faults for half an hour, with a chart of memory, sizes and lag in build/soak.png
	@mkdir -p build
	$(BIN)/python -m tests.faults --minutes 30 --calm 3 --long 120 --samples build/soak.jsonl $(ARGS)

.PHONY: audit
audit: setup ## Known vulnerabilities and the licences of the locked packages (asks the service OSV)
	$(PYTEST) --quiet tests/unit/test_licences.py
	$(BIN)/python -m tests.audit

.PHONY: bench
bench: setup ## Measure everything against the seed's system (ARGS=--quick for 3 minutes)
	$(BIN)/python -m tests.benchmarks $(ARGS)

.PHONY: format
format: setup ## Format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: docs
docs: setup ## Write the pages that are generated
	$(BIN)/python -m tests.settings_page > docs/settings.md

# The extra index options of this machine, if any, must not get into the files.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --no-header pyproject.toml

.PHONY: lock
lock: setup ## Lock the newest versions that pyproject.toml admits
	$(COMPILE) --upgrade --extra tracing --extra store --output-file config/requirements.lock
	$(COMPILE) --upgrade --all-extras --group dev --output-file config/requirements-dev.lock

.PHONY: clean
clean: ## Remove everything that was built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis *.egg-info
