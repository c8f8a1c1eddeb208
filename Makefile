# Each target creates the virtual environment that it needs. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
RUNS ?= /tmp/stabrun-recovery
STAMP := $(VENV)/.installed-$(EXTRAS)

export WANDB_MODE ?= offline
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-cuda gpu-check disasters kills full-disk damage hostile soak recovery lint bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stabrun needs Python 3.11 or newer; choose one with: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(STAMP)

# What runs and reports need, a short study, and its page.
demo:
	$(MAKE) install EXTRAS=report
	$(BIN)/stabrun sweep +experiment=demo study_dir=studies/demo
	$(BIN)/stabrun report studies/demo

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal

# The tests that need a GPU.
test-cuda: $(STAMP)
	$(BIN)/pytest -m cuda

# These, a small sweep and some steps at 830M, in less than ten minutes. Needs no network: without .venv, it takes the
# packages of $(PYTHON).
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/gpu_check.py

# The slow tests, among them: studies on Slurm and Ray whose jobs, daemons and nodes are killed.
# Slurm needs Debian's packages slurmctld, slurmd, munge and slurm-client.
disasters:
	$(MAKE) install EXTRAS=dev,slurm,ray,huggingface,lightning
	$(BIN)/pytest -n 1 -m slow -v

# Killed runs, full disks, damaged files, hostile command lines, a long run: see docs/recovery.md.
kills: $(STAMP)
	$(BIN)/pytest -m "slow or not slow" tests/test_kills.py -s -v

full-disk: $(STAMP)
	$(BIN)/pytest -m "slow or not slow" tests/test_disk.py -v

damage: $(STAMP)
	$(BIN)/pytest -m "slow or not slow" tests/test_damage.py -s -v

hostile: $(STAMP)
	$(BIN)/python tests/hostile.py 5000

soak: $(STAMP)
	$(BIN)/python scripts/soak.py

recovery: $(STAMP)
	$(BIN)/python scripts/recovery.py poison --runs $(RUNS)
	$(BIN)/python scripts/recovery.py edge --runs $(RUNS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python scripts/bench_step.py --page > $(VENV)/benchmarks.md
	$(BIN)/python scripts/bench_growth.py >> $(VENV)/benchmarks.md
	mv $(VENV)/benchmarks.md docs/benchmarks.md

docs: $(STAMP)
	$(BIN)/python -m stabrun.record.metrics > docs/metrics.md

clean:
	rm -rf $(VENV) dist build
