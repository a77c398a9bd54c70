# Everything a fresh machine needs: `make demo` shows the loop, `make test` proves it.
# DEMO_ARGS="--json out.json" passes options to the demo; PYTHON=python3.12 chooses the interpreter.

VENV ?= .venv
BIN := $(VENV)/bin
# CPU PyTorch without the CUDA download. An installer that can't reach it goes on with what it has.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export OMP_WAIT_POLICY := passive

.PHONY: help install demo test lint types unit e2e faults gpu bench-quick clean

help:
	@echo "make demo      install into $(VENV), then run the whole loop once (DEMO_ARGS passes options)"
	@echo "make test      install into $(VENV), then lint, types and all tests, the end-to-end test included"
	@echo "make unit      fast tests only"
	@echo "make faults    kill every part of real stacks and see them come back (15 minutes on two cores)"
	@echo "make gpu       tests that need a GPU"
	@echo "make bench-quick   run each benchmark for a few seconds: that it works, not how fast it is"
	@echo "make clean     stop stacks that are still up (a kept demo's too), remove $(VENV) and the state in .tide/"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@.ci/find-python "$(PYTHON)" > .python-found || { rm -f .python-found; exit 1; }
	@test -x $(BIN)/python || "$$(cat .python-found)" -m venv $(VENV)
	@rm -f .python-found
	@echo "installing pinned packages into $(VENV) (about 2 GB, some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	$(BIN)/tide demo $(DEMO_ARGS)

test: lint types unit e2e

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest

e2e: install
	$(BIN)/pytest -m e2e

faults: install
	$(BIN)/pytest -m faults tests/faults

gpu: install
	$(BIN)/pytest -m gpu

bench-quick: install
	@for script in decode adaptive stop_rules capture_cost swaps soak gpu_engine lake_scale recompute gpu_loop drift_detectors; do \
		echo "benchmarks/$$script.py --quick"; \
		$(BIN)/python benchmarks/$$script.py --quick > /dev/null || exit 1; \
	done

clean:
	@for record in .tide/stack.json .tide/*/stack.json; do \
		if test -f "$$record" && test -x $(BIN)/tide; then $(BIN)/tide down --state "$${record%/stack.json}" || exit 1; fi; \
	done
	rm -rf $(VENV) .tide
