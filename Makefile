# The two commands: `make train` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real corpora for the tests that want them; tests that lack theirs skip and say so.
VAE_DIST_DATA ?= ../shared/data
export VAE_DIST_DATA

.PHONY: install train test test-all lint format lock golden faults soak bench bench-check bench-serve bench-data bench-peers bench-kernels clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python >= 3.11 is needed. Install it, or name it: make PYTHON=python3.12 install" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: Python's venv module is missing. Run: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || { echo "error: Python's headers are missing. Run: apt-get install python3-dev" >&2; exit 2; }
	@for tool in git g++; do command -v $$tool >/dev/null || { echo "error: $$tool is missing. Run: apt-get install $$tool" >&2; exit 2; }; done
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[test,lint]'
	@touch $@

train: install
	$(BIN)/python -m vae_dist.train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m 'not long' $(ARGS)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest --durations=40 $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rewrite the golden losses after a deliberate change; the commit says why.
golden: $(VENV)/.installed-test
	PYTHONPATH=.:kernels:tests $(BIN)/python tests/golden/test_golden.py $$(mktemp -d)

# Every fault that a test does to a real run, with the times of recovery.
faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/faults $(ARGS)

# Random faults for an hour (SOAK_SECONDS=3600); prints the goodput.
SOAK_SECONDS ?= 3600
soak: $(VENV)/.installed-test
	VAE_DIST_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -s tests/faults/test_soak.py $(ARGS)

# Compare the training step with the loop that a user of PyTorch would write; ARGS=--help says how.
bench: $(VENV)/.installed
	@$(BIN)/python tests/bench/training_speed.py $(ARGS)

# The same, quicker: fails where a ratio fell more than 15 % below the committed one.
bench-check: $(VENV)/.installed
	@$(BIN)/python tests/bench/training_speed.py --no-memory --threads 1 --seconds 4 --batch-sequences 32 --models lstm_256 \
		transformer_512 --loops loop_fp32 loop_bf16 --check tests/bench/results/training-speed.json $(ARGS)

# Compare decoding with one request at a time and with `generate` of transformers; ARGS=--help says how.
bench-serve: $(VENV)/.installed-test
	@$(BIN)/python tests/bench/decode_speed.py $(ARGS)

# Compare the training stream with other data loaders; ARGS=--help says how. Peers that cannot be installed are named.
bench-data: $(VENV)/.installed
	-@$(MAKE) --no-print-directory bench-peers
	@$(BIN)/python tests/bench/data_loaders.py $(ARGS)

# Compare the fused operations with other implementations; correctness first. ARGS=--help says how.
bench-kernels: $(VENV)/.installed
	@$(BIN)/python kernels/benchmarks/run.py --json $(ARGS)

bench-peers: .bench/arrow/.installed .bench/mosaic/.installed

.bench/%/.installed: tests/bench/requirements-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# Rewrite requirements.lock from a fresh resolution of pyproject.toml.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet '.[test,lint]'
	$(VENV)-lock/bin/pip freeze --exclude-editable | grep -v -i '^vae' | sed -E 's/\+cpu$$//; s/ @ .*//' > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
