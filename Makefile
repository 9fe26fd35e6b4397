# Needs Python 3.11 to 3.13 and make, on Linux or macOS (GNU make 3.81 and a POSIX shell will do).
# Everything is installed into .venv; `make clean` takes it away again.

SHELL := /bin/sh
BIN := .venv/bin
STUBS := wire_pb2.py wire_pb2.pyi wire_pb2_grpc.py wire_pb2_grpc.pyi
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I .typing \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) \
	.typing/parallax/proto/wire.proto

# An environment whose interpreter is gone, or that was moved here with its folder, is made anew.
HOME_OF_VENV := $(shell $(BIN)/python -c 'print(open(".venv/home").read().strip())' 2>/dev/null)
ifneq ($(HOME_OF_VENV),$(CURDIR))
STALE := stale
endif

# What takes longest begins first: three minutes of soak, whose cluster may be as slow as it is.
ALONE := tests/chaos/test_soak.py tests/chaos/test_partitions.py tests/chaos/test_shortcomings.py \
	tests/benchmarks tests/chaos/test_checker.py tests/demo tests/fabric tests/fuzz tests/node \
	tests/scheduler $(wildcard tests/test_*.py) tests/network tests/deploy \
	$(filter-out tests/cli/test_demo.py,$(wildcard tests/cli/test_*.py))

.PHONY: help run test check bench chaos soak fuzz proto clean stale

help:
	@echo 'make run     a scheduler, two nodes, the built-in model, and the page'
	@echo 'make test    every test'
	@echo 'make check   lint, formatting, types, generated code, room imports'
	@echo 'make bench   speed against mlx-lm, as a table and as plots (about 20 minutes)'
	@echo 'make chaos   kill, stop and cut off nodes while clients check every answer (about an hour)'
	@echo 'make soak    random kills, stops, joins and drains for SECONDS=3600'
	@echo 'make fuzz    hostile bytes, found by coverage (Linux; SECONDS=600 for each target)'
	@echo 'make proto   generate proto/ from proto/wire.proto'
	@echo 'make clean   remove .venv and caches'

run: .venv/run-installed
	$(BIN)/parallax demo

# Tests that start no cluster share the cores, with some that bear it; the others, which start one,
# have the machine to themselves. A file's tests stay together, for what is shared among them.
test: .venv/dev-installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ALONE)
	$(BIN)/python -m pytest $(ALONE:%=--ignore=%)

check: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@fresh=$$(mktemp -d) || exit 1; \
	trap 'rm -rf "$$fresh"' EXIT; \
	$(call PROTOC,"$$fresh") || exit 1; \
	for stub in $(STUBS); do \
	  diff -u "proto/$$stub" "$$fresh/parallax/proto/$$stub" || { \
	    echo "proto/$$stub is not what proto/wire.proto gives: run make proto" >&2; exit 1; }; \
	done; \
	echo 'proto/ is what proto/wire.proto gives'
	$(BIN)/python -m pytest -q tests/test_rooms.py

bench: .venv/dev-installed
	$(BIN)/python -m benchmarks --document

chaos: .venv/dev-installed
	$(BIN)/python -m tests.chaos

soak: SECONDS ?= 3600
soak: .venv/dev-installed
	$(BIN)/python -m tests.chaos soak --seconds $(SECONDS)

# make fuzz TARGETS='tensors frames' SECONDS=60 KEEP=--keep
fuzz: .venv/fuzz-installed
	PYTHONPATH=.typing:. $(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600) $(KEEP) $(TARGETS)

proto: .venv/dev-installed
	$(call PROTOC,.typing)

clean:
	rm -rf .venv build dist parallax_cluster.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run-installed: .venv/home pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/dev-installed: .venv/home pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch .venv/run-installed $@

.venv/fuzz-installed: .venv/dev-installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,fuzz]'
	@touch $@

# A version manager's shim may exist for a Python that is not installed, so each is tried, not looked
# up; Debian's Python comes without ensurepip unless python3-venv is there.
.venv/home: $(STALE)
	@found=; crippled=; \
	for python in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    >/dev/null 2>&1 || continue; \
	  if "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$python; break; fi; \
	  crippled=$$python; \
	done; \
	if [ -z "$$found" ] && [ -n "$$crippled" ]; then \
	  echo "$$crippled cannot make virtual environments: it has no ensurepip." >&2; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	if [ -z "$$found" ]; then \
	  echo "Parallax needs Python 3.11, 3.12 or 3.13, and none was found on the PATH." >&2; \
	  echo "Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Making .venv with $$("$$found" --version). The first time takes some minutes."; \
	rm -rf .venv && "$$found" -m venv .venv && pwd -P > $@
