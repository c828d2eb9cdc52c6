# Every target sets up what it needs: python3 >= 3.11 and make are enough. PYTHON=... picks the interpreter, EXTRA=cuda or EXTRA=tpu the accelerator.
PYTHON ?= python3
EXTRA ?= dev
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRA)

.PHONY: quickstart test lint bench kills matrix constraints clean
.DELETE_ON_ERROR:

quickstart: $(READY)  ## a policy learns sums from rewards in front of you
	$(BIN)/python experiments/quickstart.py $(ARGS)

test: $(READY)  ## all tests, warnings as errors, on all cores
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

kills: $(READY)  ## N runs killed with -9 and compared bit for bit with an uninterrupted one
	RLALIGN_KILLS=$(or $(N),5) $(BIN)/python -m pytest tests/faults/test_kill.py

matrix: $(READY)  ## every combination of advantage, ratio, clip, aggregation, KL and importance correction
	RLALIGN_MATRIX=all $(BIN)/python -m pytest -n auto tests/test_matrix.py

bench: $(READY)  ## one JSON line a benchmark
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/rollout.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python {sys.version.split()[0]} is too old: use PYTHON=... with 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e ".[dev,$(EXTRA)]"
	touch $@

constraints: $(READY)  ## resolve the versions anew
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra tensorboard --universal --python-version 3.11 --no-header --no-annotate --quiet -o constraints.txt

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
