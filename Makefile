# `make demo` and `make test` each make .venv and install what they need by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROJECT := pyproject.toml

.PHONY: demo test test-slow lint docs docs-check clean
.DELETE_ON_ERROR:

$(VENV)/core.stamp: $(PROJECT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# torch first and pinned: the plain name would bring gigabytes of CUDA libraries on some indexes.
$(VENV)/test.stamp: $(PROJECT) $(VENV)/core.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/docs.stamp: $(PROJECT) $(VENV)/core.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

demo: $(VENV)/core.stamp
	$(BIN)/tmjax merge experiments/swahili/demo.yaml

test: $(VENV)/test.stamp lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' --durations=10

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation in build/docs; warnings are errors.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

# Runs every command of README.md, CONTRIBUTING.md, docs/ and experiments/ as printed, and the tutorial, in a copy, and
# compares the output that they show.
docs-check: $(VENV)/test.stamp $(VENV)/docs.stamp
	$(BIN)/python -m tools.docs_check

clean:
	rm -rf $(VENV) runs build .pytest_cache .ruff_cache .hypothesis
