# make demo: set up, train on real handwritten digits, open the posterior.   make test: set up, lint, types, tests.
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo

SOAK_MINUTES ?= 30

.PHONY: demo test soak clean test-matrix
.DEFAULT_GOAL := demo

# The first interpreter of version 3.12 or later that really runs; a version manager's own folders come last.
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

demo: $(VENV)/.installed
	$(PY) -m inference.train --dataset digits --preset digits --epochs 140 --target-retention 0.6 --lr 0.002 --draws 1 --curvature-batch 64 --samples 100 --out $(DEMO) --overwrite
	$(PY) -m analysis.report --run $(DEMO)

test: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

# Train, kill, resume, predict, prune, over and over: memory and open files must not grow.
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) tests/soak.py --minutes $(SOAK_MINUTES) --out runs/soak.json

# Every supported Python with the oldest and the newest torch: long, for every now and then.
test-matrix: $(VENV)/.installed
	$(PY) tests/matrix.py

clean:
	rm -rf $(VENV) .venv-matrix runs .pytest_cache .mypy_cache .ruff_cache
