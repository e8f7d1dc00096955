# `make serve DISK=…` and `make test` each set up all that they need, and nothing when it is there already.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
IMAGE ?= pynbd
IMAGE_ARGS ?=

python = $(VENV)/bin/python
# not empty when the user named a Python, in the environment or on the command line
chosen_python = $(filter-out file default,$(origin PYTHON))

# A Python that the user named and that is not the one of the environment makes it anew.
ifneq ($(chosen_python),)
ifneq ($(shell { $(PYTHON) -V; } 2>/dev/null),$(shell { $(python) -V; } 2>/dev/null))
.PHONY: $(VENV)/.installed $(VENV)/.installed-dev
endif
endif

.PHONY: help serve test lint types pytest attach bench image packages
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/.installed ## serve DISK over NBD: DISK=file [SIZE=1G: make it when missing] [FORMAT=raw] [SERVE_ARGS=…]
	@test -n "$(DISK)" || { echo "which disk? make serve DISK=disk.raw (SIZE=1G makes one that is missing)" >&2; exit 2; }
	@test -z "$(SIZE)" || test -e "$(DISK)" || truncate -s "$(SIZE)" "$(DISK)"
	@exec $(python) -m pynbd serve $(if $(FORMAT),-f "$(FORMAT)") $(SERVE_ARGS) "$(DISK)"

test: lint types pytest ## lint, types and all tests

lint: $(VENV)/.installed-dev ## ruff: rules and format
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: $(VENV)/.installed-dev ## mypy --strict
	$(python) -m mypy

pytest: $(VENV)/.installed-dev packages ## all tests; PYTEST_ARGS="-m 'not slow' tests/block" chooses
	$(python) -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

attach: $(VENV)/.installed-dev packages ## shows a kernel that attaches: SCENARIO=part of a name, or list, or shell [DISK=file]
	@$(python) -m tests.attach $(if $(SCENARIO),"$(SCENARIO)") $(if $(DISK),--disk "$(DISK)") $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev packages ## pynbd beside qemu-nbd and nbdkit; BENCH_ARGS="--help" tells what it can
	$(python) -m tests.benchmarks $(BENCH_ARGS)

image: ## a container image of docker/Dockerfile, by docker, podman or buildah: [IMAGE=pynbd] [IMAGE_ARGS=…]
	@docker/build_image "$(IMAGE)" $(IMAGE_ARGS)

packages: ## the Debian packages of tests/packages.txt and, beside the system's, a recent QEMU
	@tests/setup/install_packages
	@tests/setup/fetch_qemu10

$(VENV)/.installed: pyproject.toml tests/setup/make_venv
	@tests/setup/make_venv "$(VENV)" "$(PYTHON)" "$(chosen_python)" ""
	@touch $@

$(VENV)/.installed-dev: pyproject.toml tests/setup/make_venv
	@tests/setup/make_venv "$(VENV)" "$(PYTHON)" "$(chosen_python)" "[dev]"
	@touch $@ $(VENV)/.installed
