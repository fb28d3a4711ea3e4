# Two commands for users: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# one interpreter of that version or newer is enough; a machine may only know it as python3
INTERPRETER := $(shell command -v $(PYTHON) || command -v python3)

# threads that wait by spinning make everything many times slower on a machine that is busy
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(INTERPRETER) -c 'import sys; sys.exit("lorahub needs Python 3.11 or newer; run make PYTHON=/path/to/python" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(INTERPRETER) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint,pictures]'
	touch $@

demo: $(STAMP)
	$(BIN)/lorahub demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

bench: $(STAMP)
	for table in benchmarks/*.py; do $(BIN)/python $$table --quick --json $${table%.py}.quick.json || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
