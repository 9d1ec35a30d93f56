# `make test` and `make demo` work on a fresh clone: they make .venv, install the pinned torch, then build the package.
# Another torch or Python: make test TORCH=2.9.0 PYTHON=python3.12 (a change of PYTHON makes .venv anew).

PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv
TESTS  ?= tests
WORKERS ?= auto
SANITIZE_TESTS ?= tests/ops tests/direg/test_stream.py tests/simt
# Code for sm_80 runs on 8.x cards, PTX for 90 on later ones: every card works, in a third of a release's build time.
ARCHS  ?= 80-real;90-real;90-virtual

BIN      := $(VENV)/bin
PY       := $(BIN)/python
PYTEST   := $(PY) -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal
# Stamps carry what they stand for in their names, so that another value makes them anew.
MADE     := $(VENV)/.made-by-$(subst /,_,$(PYTHON))
TORCHED  := $(VENV)/.torch-$(TORCH)
EQUIPPED := $(VENV)/.dev-$(TORCH)
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test ptx build lint format bench sanitize release clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | \
	 while IFS="$$(printf '\t')" read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

demo: build ## run the demonstration
	$(BIN)/prosocial demo

test: build ## run the tests (TESTS=path for a part, WORKERS=0 for one process)
	$(PYTEST) $(TESTS)

ptx: build ## run the CUDA kernels' tests on the PTX that nvcc makes of them
	PROSOCIAL_TEST_KERNELS=ptx $(PYTEST) tests/simt

build: $(EQUIPPED) ## compile what changed and install it in place
	PROSOCIAL_CUDA_ARCHS='$(ARCHS)' $(PY) -m pip install -qq --no-build-isolation --editable .

lint: $(EQUIPPED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(EQUIPPED) ## bring Python and C++ into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: build ## measure the ops against their peers and this machine's memory
	$(PY) -m pytest benchmarks -o python_files='bench_*.py' -s

# The reference is torch's code, not ours: its runs are left out. Python itself leaks, so leaks are not looked for.
# libstdc++ comes first with the sanitizer, which must find it to follow exceptions; python does not load it itself.
# --capture=sys lets the sanitizers' reports through, which go to the file descriptor just before the process dies.
# Another seed, so that the CUDA kernels meet two schedules in a run of all checks.
sanitize: build ## run the kernels' tests under the address and undefined-behaviour sanitizers
	PROSOCIAL_SANITIZE=1 PROSOCIAL_CUDA=off $(PY) setup.py --quiet build \
	  --build-base build/sanitize --build-lib build/sanitize/site
	PROSOCIAL_TEST_ISA="$$($(PY) -c 'import prosocial_ext._C as c; print(c.available_isas()[-1])')" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PROSOCIAL_SIMT_SEED=sanitize \
	  $(PYTEST) $(SANITIZE_TESTS) --capture=sys -o pythonpath='build/sanitize/site .' \
	  -m 'not slow' -k 'not ([reference or -reference)'

release: $(EQUIPPED) ## build sdist and wheel for all GPU architectures, warnings and spills as errors
	PROSOCIAL_CUDA=on PROSOCIAL_CUDA_STRICT=1 $(PY) -m build --outdir dist .

clean: ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f prosocial_ext/_C.*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "PYTHON=$(PYTHON) is Python " + sys.version.split()[0] + ", 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(TORCHED): $(MADE)
	$(PY) -m pip install --quiet torch==$(TORCH)
	@rm -f $(VENV)/.torch-* $(VENV)/.dev-*
	@touch $@

$(EQUIPPED): $(TORCHED) pyproject.toml
	$(PY) -m pip install --quiet --group dev
	@touch $@
