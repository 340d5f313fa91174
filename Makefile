# Two commands for a newcomer: `make demo` and `make test`. Both do the set-up they need, once.
# Every line can also be typed by hand.

# The tested Python is 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# A folder with a prebuilt wheel of mmcv saves the 12 minutes in which mmcv compiles.
WHEELS ?= ../shared/wheels
export PIP_FIND_LINKS := $(strip $(PIP_FIND_LINKS) $(abspath $(wildcard $(WHEELS))))
# A backend for pictures that needs no screen.
export MPLBACKEND ?= Agg

NATIVE_SOURCES := $(shell find csrc -type f -not -name '*.md') setup.py pyproject.toml \
                  mmdcnv4/version.py

.PHONY: help setup build test test-all mutate demo lint format bench sanitize cuda-build test-gpu first-contact bench-gpu clean
help:
	@echo 'make demo      set up, train the quick start on the CPU, draw its pictures'
	@echo 'make test      set up, run the tests; test-all: the slow ones as well'
	@echo 'make mutate    put faults into the kernels, one at a time: does a test see each?'
	@echo 'make bench     time the operator on this machine'
	@echo 'make sanitize  hostile inputs under AddressSanitizer and UBSan'
	@echo 'make lint      ruff and mypy; format: what ruff can mend, clang-format on changed lines'
	@echo 'make test-gpu  build for the GPU of this machine and test on it; bench-gpu: time it;'
	@echo '               first-contact OUT=folder: all of it, with profiles, in ten minutes'
	@echo 'make cuda-build  compile and link the CUDA kernels, without a GPU'
	@echo 'make build     compile the extension after a change in csrc/'

$(VENV)/.installed: dev/setup_venv.sh $(wildcard requirements/*.txt)
	bash dev/setup_venv.sh $(PYTHON) $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	$(BIN)/pip install --no-build-isolation --no-deps --editable .
	touch $@

setup: $(VENV)/.built

build: $(VENV)/.built

# Two processes of one thread each, a file of tests in either: the tests are many small computations,
# and threads that wait for each other take many times as long as soon as another program wants a
# core. TEST_PROCESSES=0 runs all in one, as for a debugger.
TEST_PROCESSES ?= 2
test: $(VENV)/.built
	OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) $(BIN)/python -m pytest \
		--numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Also those marked slow, by hand every now and then: they take 9 GiB of memory and much more time.
test-all:
	$(MAKE) test TEST_PROCESSES=0 PYTEST_ARGS="--slow $(PYTEST_ARGS)"

# Each of the 374 faults is compiled and tested: about five seconds of one core.
mutate: $(VENV)/.built
	$(BIN)/python tests/cuda/mutations.py $(MUTATE_ARGS)

demo: $(VENV)/.built
	$(BIN)/python tools/demo/quick_start.py

bench: $(VENV)/.built
	$(BIN)/python benchmarks/cpu.py

sanitize: $(VENV)/.built
	bash dev/sanitize.sh $(BIN)/python

# These three use the Python of the machine, with its CUDA build of torch; no mm package is needed.
test-gpu:
	$(or $(GPU_PYTHON),python3) dev/gpu/contact.py --steps smoke tests sanitizers

first-contact:
	$(or $(GPU_PYTHON),python3) dev/gpu/contact.py --out $(or $(OUT),.build/contact)

bench-gpu:
	bash dev/gpu/build.sh $(or $(GPU_PYTHON),python3)
	PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(or $(GPU_PYTHON),python3) benchmarks/gpu.py $(BENCH_ARGS)

cuda-build:
	bash dev/cuda/build.sh

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/mypy mmdcnv4

# Not `ruff format`: it would rewrite 162 of 191 files, among them tables that are aligned by hand.
format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	VENV=$(VENV) bash dev/format_cpp.sh --force

clean:
	rm -rf build .build *.egg-info mmdcnv4/_C*.so $(VENV)/.built
