# make demo   installs, prepares the embedded corpus, trains a tiny LPA model, evaluates and samples it
# make test   installs and runs the test suite (make test-all: with the full matrices), in WORKERS processes
# make faults kills, fills and damages running jobs (an hour), and writes the table of docs/reliability.md
# make check  linters and types;  make clean  removes what the above made
VENV := .venv
BIN := $(VENV)/bin

# The first of these that is Python 3.11 or 3.12; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
# A torch of the pinned version that is installed already (a CPU build, say) is used, not downloaded.
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)
INSTALLED_TORCH = $(shell $(PYTHON) -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' 2>/dev/null)
VENV_OPTIONS = $(if $(filter $(TORCH),$(INSTALLED_TORCH)),--system-site-packages)

.PHONY: setup demo test test-all faults check format clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed and was not found; make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

demo: setup
	$(BIN)/python -m data.prepare --config configs/data/embedded.yaml
	$(BIN)/deepspeed train.py --config lpa_tiny.yaml
	$(BIN)/python -m eval.perplexity --checkpoint runs/lpa_tiny --data prepared/embedded --output runs/lpa_tiny/test.json
	$(BIN)/python -m eval.generate --checkpoint runs/lpa_tiny --prompt "The module" --max_new_tokens 96 --num_samples 3
	@echo
	@echo "run directory     runs/lpa_tiny (log.txt, metrics.jsonl, checkpoints/, test.json)"
	@echo "TensorBoard logs  $(BIN)/tensorboard --logdir runs/lpa_tiny/tensorboard"

# Tests of one file stay together: they share fixtures.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

faults: setup
	@mkdir -p runs
	$(BIN)/python -m pytest tests/faults --fault-results runs/faults.json
	$(BIN)/python -m tests.faults.table runs/faults.json --output docs/reliability.md

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy train.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) prepared/embedded runs/lpa_tiny .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
