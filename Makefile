# make demo   sets up a virtual environment here and runs TAD end to end on the embedded tiny model (CPU)
# make test   sets one up and runs the tests
PYTHON ?= python3
BIN := .venv/bin

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

demo: .venv/ready
	$(BIN)/python tad.py

test: .venv/ready
	$(BIN)/python -m pytest -rs -q tests

clean:
	rm -rf .venv out

.PHONY: demo test clean
