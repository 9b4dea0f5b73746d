PYTHON ?= python3
BIN := .venv/bin
# One single-threaded worker per core, since threads that share a core wait for each other. Idle
# workers steal tests from busy ones, because a few tests take as long as hundreds of others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Two threads per worker, which sleep while they wait: they don't need cores of their own.
TWO_THREADS := OMP_WAIT_POLICY=passive $(subst THREADS=1,THREADS=2,$(PYTEST))
# What `make test` leaves out, plus the property tests that draw more examples in this profile.
DEEP := -m "slow or deep" --hypothesis-profile deep
# Tests of values. `make slow` repeats them with other code paths of PyTorch's MKL and of NumPy's and
# SciPy's OpenBLAS, which round differently, as another machine would.
VALUES := $(patsubst %,tests/test_%.py,values metrics cka cka_precision rsa neighbours reference reference_properties ablation spectral probe)

.PHONY: sweep train test lint check slow bench gpu-report clean

sweep: .venv/experiments
	$(BIN)/repsim sweep

train: .venv/experiments
	$(BIN)/repsim train

test: .venv/dev
	$(PYTEST) $(COVERAGE)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/dev .venv/triton-3.6
	$(PYTEST) $(DEEP)
	TRITON_INTERPRET=1 $(PYTEST) $(DEEP) tests/triton
	PYTHONPATH=.venv/triton-3.6 $(PYTEST) -m "" tests/compile
	PYTHONPATH=.venv/triton-3.6 $(PYTEST) tests/test_gpu_report_cache.py
	MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott $(PYTEST) --hypothesis-profile deep $(VALUES)
	MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Sandybridge $(PYTEST) --hypothesis-profile deep $(VALUES)
	MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem $(TWO_THREADS) $(VALUES)
	$(TWO_THREADS) $(VALUES)

check: test lint slow

bench: .venv/dev
	mkdir -p bench/results
	$(BIN)/python -m pytest bench --benchmark-only --results bench/results -m "" --override-ini="python_files=bench_*.py" --override-ini="filterwarnings=default"

# Compiles the kernels for a GPU, rehearses the report, and prints the command for the GPU machine.
gpu-report: .venv/dev .venv/triton-3.6
	$(BIN)/python -m bench prepare-gpu-report

clean:
	rm -rf .venv runs build

.venv/triton-3.6: .venv/dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ triton==3.6.0
	touch $@

.venv/%: pyproject.toml CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
