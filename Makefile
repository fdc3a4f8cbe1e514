# make demo and make test do all their set-up on a fresh machine.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test gpu emulate lint format sanitize clean

# PyTorch comes first and by itself: a machine without a GPU then keeps the build it is given here.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(BIN)/pip install -e '.[dev]'
	touch $@

demo: $(VENV)/.dev
	$(BIN)/ncfast demo --output demo-output

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# Every tensor an allocation of its own: within PyTorch's segments memcheck would take one tensor for another.
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

# For machines with a GPU and the CUDA toolkit; never run on hardware so far.
gpu: $(VENV)/.dev
	$(BIN)/python -c "import torch; torch.cuda.current_device()"
	NCFAST_CUDA=1 $(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m pytest -m gpu
	$(SANITIZE) --tool memcheck $(BIN)/python -m pytest -m gpu
	$(SANITIZE) --tool racecheck $(BIN)/python -m pytest -m gpu
	$(SANITIZE) --tool synccheck $(BIN)/python -m pytest -m gpu
	$(SANITIZE) --tool initcheck $(BIN)/python -m pytest -m gpu tests/test_cuda_hardware.py

# The AMX bodies where there is AVX512-BF16 but no AMX: the tests of the operations with the tiles in memory.
emulate: $(VENV)/.dev
	CPPFLAGS=-DNCFAST_EMULATE_AMX NCFAST_CUDA=0 $(BIN)/python setup.py -q build -b build/emulated --build-lib build/emulated/lib
	PYTHONPATH=build/emulated/lib NCFAST_CPU_ISA=amx $(BIN)/pytest \
		tests/test_class_scatter.py tests/test_affine_argmax.py tests/test_pair_geometry.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

# With the tiles in memory, as sanitizers do not see what a tile instruction reads.
sanitize:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -w -pthread -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc \
		-DNCFAST_EMULATE_AMX csrc/sanitize.cpp csrc/cpu/*.cpp -o build/sanitize
	build/sanitize

clean:
	rm -rf $(VENV) build dist *.egg-info ncfast/*.so demo-output
