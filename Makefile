# make alone lists the targets; each sets up the virtual environment first.
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

SOAK_MINUTES ?= 30
FUZZ_SECONDS ?= 60

.PHONY: help lint format test test-all test-matrix demo soak fuzz clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The first interpreter of version 3.12 or later that runs; the folders of a version manager come last.
$(VENV)/.installed: pyproject.toml
	@set -e; found=; \
	for candidate in python3.14 python3.13 python3.12 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
	  if "$$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "pyro-isingvit needs Python 3.12 or later: none of python3.14, python3.13, python3.12, python3 is one. Install it and run make again." >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$("$$found" --version) (some minutes: torch is large)"; \
	[ -x $(PY) ] || "$$found" -m venv $(VENV); \
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'; \
	touch $@

lint: $(VENV)/.installed ## check style and types: ruff, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed ## rewrite the code in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: lint ## lint, then the quick tests
	$(PYTEST) -m "not slow"

test-all: lint ## lint, then every test and the docstring examples
	$(PYTEST)

test-matrix: $(VENV)/.installed ## test every supported Python with the oldest and the newest torch (long)
	$(PY) tests/matrix.py

demo: $(VENV)/.installed ## train on real handwritten digits and write the report
	OMP_NUM_THREADS=1 $(PY) -m inference.train --dataset digits --preset digits --epochs 140 --target-retention 0.7 --max-keep 0.98 --lr 0.004 --mix mixup --samples 100 --out $(DEMO) --overwrite
	$(PY) -m analysis.report --run $(DEMO)

soak: $(VENV)/.installed ## train, kill, resume, predict, prune for SOAK_MINUTES=30: memory and open files must not grow
	OMP_NUM_THREADS=1 $(PY) tests/soak.py --minutes $(SOAK_MINUTES) --out runs/soak.json

fuzz: $(VENV)/.installed ## give every reader of files bytes that nobody meant, FUZZ_SECONDS=60 each (Python 3.12 or 3.13)
	$(PY) -m pip install --quiet --disable-pip-version-check atheris
	set -e; for reader in png jpeg tiff npy npz array table cache; do $(PY) tests/fuzz.py --seconds $(FUZZ_SECONDS) --reader $$reader; done

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf $(VENV) .venv-matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
