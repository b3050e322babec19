# make demo    synthetic images, three steps, one table; installs what it needs into .venv first
# make test    every test
# make mutants  plants single faults in the code and reports which of them the tests miss
# make paper DATASET=../dataset_loco    the paper's table
# make results    measures the numbers of the README and of docs/ again, where the data are present
# make bench   times of scoring, beside those of the forward pass alone

PYTHON ?= python3
DATASET ?= ../dataset_loco
PAPER_FLAGS ?=
BENCH_FLAGS ?=
PY := .venv/bin/python
# Python compiles what it imports; compiling all of torch doubles the installation's CPU time.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test mutants lint paper bench results clean

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: python must be at least 3.10, got " + sys.version.split()[0] + "; pass PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-demo: .venv/installed requirements-demo.txt requirements-timm.txt
	$(PIP) -r requirements-demo.txt
	touch $@

.venv/installed-dev: .venv/installed-demo requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

demo: .venv/installed-demo
	@PYTHON="$(PY)" sh demo/run.sh

test: .venv/installed-dev
	$(PY) -m pytest -n 2 --dist loadfile

mutants: .venv/installed-dev
	$(PY) tests/mutate.py

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

paper: .venv/installed
	$(PY) reproduce_paper.py --dataset_dir "$(DATASET)" $(PAPER_FLAGS)

bench: .venv/installed
	$(PY) benchmarks/bench.py $(BENCH_FLAGS)

results: .venv/installed-demo
	$(PY) benchmarks/make_results.py

clean:
	rm -rf demo/out
