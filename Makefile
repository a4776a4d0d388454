# Targets make .venv on first use. Prerequisites: Python 3.11+, make, a C++17 compiler.

PYTHON ?= python3
CXX ?= c++
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_SOURCES := $(filter %.cpp %.h,$(SOURCES)) $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh tests/native/*.h)
PY_SOURCES := python tests benchmarks scripts triton_kernels

.PHONY: demo test bench wheel lint format prerequisites clean

demo: .venv/installed  ## rerank real documents and compare with stock Hugging Face
	$(BIN)/rankernel demo

test: .venv/installed
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

wheel: .venv/installed  ## dist/: for this machine's Python, not repaired for others
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

lint: .venv/installed
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: .venv/installed
	$(BIN)/ruff check --fix $(PY_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

prerequisites:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "rankernel needs Python 3.11 or newer; set PYTHON=/path/to/python3 (found: $$($(PYTHON) --version 2>&1))"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "rankernel needs Python's venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@echo 'int main() { return __cplusplus >= 201703L ? 0 : 1; }' | $(CXX) -std=c++17 -x c++ -fsyntax-only - 2>/dev/null || \
	  { echo "rankernel needs a C++17 compiler; set CXX=/path/to/g++ (Debian: apt-get install g++)"; exit 1; }

# torch first, so that nothing else asks for another build of it. Tests want AMX's software tiles everywhere.
.venv/installed: $(SOURCES) constraints.txt | prerequisites
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt scikit-build-core pybind11 cmake ninja
	CXX=$(CXX) RANKERNEL_AMX_EMULATED=ON $(BIN)/pip install --quiet --no-build-isolation --constraint constraints.txt \
	  --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
