# `make demo` and `make test` need nothing but Python 3.11+, make and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Pretrained backbone weights, where a file is at hand (see README, "Weights").
WEIGHTS ?= $(firstword $(wildcard ../shared/weights/*.safetensors) auto)
DATA    ?= ../shared/data

.PHONY: help demo test check slow bench tables setup clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    set up, then the main job on generated images (5 minutes)"
	@echo "make test    set up, then the fast tests (10 minutes at most)"
	@echo "make check   lint, format, types, layers, examples and fast tests"
	@echo "make slow    packaging, corpora, long tests"
	@echo "make bench   speed and memory, as ratios measured side by side"
	@echo "make tables  render the tables from the committed results; RUN=1 first runs what is missing (hours)"

setup: $(STAMP)

# torch first and pinned: a range would take the newest build, with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# What `umiad export` needs is large; only what tests or times exports installs it.
$(VENV)/.exports: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[onnx,openvino]'
	@touch $@

demo: setup
	$(BIN)/umiad demo --out demo-out --weights "$(WEIGHTS)"

# Two processes of one thread each: small tensors gain nothing from threads.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q --doctest-modules src tests

slow: $(VENV)/.exports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'slow or not slow' --timeout=1800 --reliability=benchmarks/results/reliability.json; \
	  status=$$?; $(BIN)/python benchmarks/reliability_table.py && exit $$status

bench: $(VENV)/.exports
	$(BIN)/python benchmarks/metrics_speed.py
	$(BIN)/python benchmarks/speed.py --weights "$(WEIGHTS)"
	$(BIN)/python benchmarks/scoring_speed.py --weights "$(WEIGHTS)"
	$(BIN)/python benchmarks/fit_cost.py --weights "$(WEIGHTS)"
	$(BIN)/python benchmarks/performance.py --data "$(DATA)" --weights "$(WEIGHTS)"
	[ ! -d "$(DATA)/head_ct" ] || $(BIN)/python benchmarks/compact_features.py --data "$(DATA)" --weights "$(WEIGHTS)"
	[ ! -d "$(DATA)/head_ct" ] || $(BIN)/python benchmarks/same_scores.py --again --data "$(DATA)" --weights "$(WEIGHTS)"
	[ ! -d "$(DATA)/busi/normal" ] || $(BIN)/python benchmarks/export_parity.py --data "$(DATA)" --weights "$(WEIGHTS)"
	$(BIN)/python benchmarks/performance_page.py
	[ ! -d "$(DATA)/busi/normal" ] || $(BIN)/python benchmarks/reading_cost.py --data "$(DATA)/busi/normal" --weights "$(WEIGHTS)"

tables: setup
ifdef RUN
	$(BIN)/python benchmarks/paper_protocol.py --data "$(DATA)" --weights "$(WEIGHTS)" benchmarks/table3.toml benchmarks/rivals.toml benchmarks/foundation.toml
	$(BIN)/python benchmarks/paper_protocol.py --data "$(DATA)" --weights "$(WEIGHTS)" --remember benchmarks/win.toml
	$(BIN)/python benchmarks/paper_protocol.py --data "$(DATA)" --weights "$(WEIGHTS)" --remember benchmarks/ablation.toml
	$(BIN)/python benchmarks/paper_protocol.py --data "$(DATA)" --weights "$(WEIGHTS)" benchmarks/ablation_sizes.toml
	$(BIN)/python benchmarks/ablation_schedule.py --data "$(DATA)" --weights "$(WEIGHTS)"
	$(BIN)/python benchmarks/table1.py --data "$(DATA)"
	$(BIN)/python benchmarks/table2.py
	$(BIN)/python benchmarks/figures.py --data "$(DATA)" --weights "$(WEIGHTS)"
	for name in proxy ideas learning_curve worst_misses limits; do \
	  $(BIN)/python benchmarks/$$name.py --data "$(DATA)" --weights "$(WEIGHTS)" || exit 1; done
endif
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/reliability_table.py

clean:
	rm -rf demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
