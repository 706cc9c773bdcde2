# make demo    picture and table from the whole path on the small model
# make test    every test (ComfyUI is booted on the CPU)
# make lint | types | unit | comfy | browser    one part
# make fuzz    random attacks on every reader of files, FUZZ_MINUTES=10 of them
# make matrix [ROWS="python3.10 torch*"] [SUITE=build|start]    the unit tests with other versions, in an
#              environment of its own for each row of docs/compatibility.md, one after the other
#
# PYTHON=/path/to/python3.x   interpreter for .venv (default: the newest of 3.10 to 3.13 found)
# COMFYUI_PATH=/path/to/ComfyUI   a tree to use instead of the pinned 0.30.0

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test setup comfyui npm lint types unit comfy browser gpu fuzz matrix constraints golden workflows thumbnails clean

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
COMFYUI := $(abspath $(or $(COMFYUI_PATH),.comfyui))
export COMFYUI_PATH := $(COMFYUI)
# Two workers' worth of cores is what the tests are sized for; more threads only add noise.
export OMP_NUM_THREADS ?= 2
UV := $(BIN)/uv
CONSTRAINTS := constraints/ci.txt

# A pyenv shim answers `command -v` for versions it cannot run, hence the trial run.
USABLE := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3.10 python3; do \
	"$$name" -c '$(USABLE)' 2>/dev/null && echo "$$name" && break; done)

demo: setup
	$(BIN)/python tests/tools/demo.py --comfyui $(COMFYUI) --output output

test: setup npm
	$(BIN)/python -m pytest tests

unit: setup
	$(BIN)/python -m pytest tests/unit

comfy: setup
	$(BIN)/python -m pytest tests/comfy

browser: setup npm
	$(BIN)/python -m pytest tests/browser

# `make test` runs the same tests with the same examples each time; here they are new ones, round by
# round until the time is up. What fails is kept in .hypothesis and tried first the next time.
FUZZ_MINUTES ?= 10
fuzz: setup
	end=$$((SECONDS + 60 * $(FUZZ_MINUTES))); \
	while ((SECONDS < end)); do \
		$(BIN)/python -m pytest -q --hypothesis-profile=fuzz tests/attacks/test_fuzz_*.py \
			tests/attacks/test_names.py; \
	done

# Needs an NVIDIA GPU; not a part of `make test`.
gpu: setup
	$(BIN)/python -m pytest -s tests/gpu

# Rewrites the table in docs/compatibility.md; review the diff.
matrix: setup
	$(BIN)/python tests/tools/matrix.py --comfyui $(COMFYUI) --suite $(or $(SUITE),unit) $(ROWS)

lint: setup .checks/flux_fp4
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.checks $(BIN)/lint-imports --config pyproject.toml --no-cache

# Through the symlink: `mypy quant trt_runtime` would report success on wrong calls, because the
# relative imports of a package without a name resolve to nothing.
types: setup .checks/flux_fp4
	cd .checks && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		-p flux_fp4.quant -p flux_fp4.trt_runtime -p flux_fp4.nodes -p flux_fp4.cli

.checks/flux_fp4:
	mkdir -p .checks
	ln -sfn .. $@

setup: $(VENV)/.packages

$(VENV)/.uv: $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 with venv found; set PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || test -x $(BIN)/python.exe || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) uv
	touch $@

$(VENV)/.packages: $(VENV)/.uv requirements.txt pyproject.toml | comfyui
	$(UV) pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) \
		-r $(COMFYUI)/requirements.txt -r requirements.txt --group dev
	touch $@

ifeq ($(COMFYUI),$(abspath .comfyui))
comfyui: $(VENV)/.uv
	$(BIN)/python tests/tools/obtain_comfyui.py $(COMFYUI)
else
comfyui:
	@test -f $(COMFYUI)/main.py || { echo "COMFYUI_PATH=$(COMFYUI) has no main.py" >&2; exit 1; }
endif

# The browser tests say themselves what is missing when there is no npm.
npm:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory tests/browser/node_modules/.installed; fi

tests/browser/node_modules/.installed: tests/browser/package-lock.json
	cd tests/browser && npm ci --silent --no-audit --no-fund
	touch $@

# After an intended change of a node: rewrites tests/golden/object_info.json; review the diff.
golden: setup
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/comfy/test_object_info.py

# After a change of the nodes or of tests/tools/shipped_workflows.py; review the diff, and in a browser.
workflows: setup
	$(BIN)/python tests/tools/shipped_workflows.py --comfyui $(COMFYUI)

# After a change of the workflows or of the small model; look at the pictures.
thumbnails: setup
	$(BIN)/python tests/tools/thumbnails.py --comfyui $(COMFYUI)

# New pinned versions for every supported Python.
constraints: $(VENV)/.uv comfyui
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate --no-header \
		--group dev requirements.txt constraints/ci.in $(COMFYUI)/requirements.txt -o $(CONSTRAINTS)

clean:
	rm -rf $(VENV) .comfyui .checks output tests/browser/node_modules
