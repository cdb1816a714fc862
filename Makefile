# make demo   sets up a virtual environment here and runs TAD end to end on the embedded tiny model (CPU)
# make test   sets one up, with what only the tests need, and runs the tests on all cores
# make check  the tests that start no process and compile nothing: under two minutes
PYTHON ?= python3
BIN := .venv/bin
# glibc keeps what is freed: giving it back to the kernel was a quarter of the tiny model's decoding time
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 33554432

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	touch $@

demo: .venv/ready
	$(BIN)/python tad.py

test: .venv/test-ready
	$(BIN)/python -m pytest -rs -q -n auto --dist loadfile --no-loadscope-reorder tests

check: .venv/test-ready
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" tests

clean:
	rm -rf .venv out

.PHONY: demo test check clean
