# make demo   sets up a virtual environment here and runs TAD end to end on the embedded tiny model (CPU), beside it
#             its control, fine-tuning with random masks on the same responses
# make test   sets one up, with what only the tests need, and runs the tests on all cores
# make check  the tests that start no process and compile nothing: under two minutes
PYTHON ?= python3
BIN := .venv/bin

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	touch $@

demo: .venv/ready
	@date +%s > .venv/began
	$(BIN)/python tad.py
	$(BIN)/python trims.py --trajectory_share 0 --data out/tad-tiny/trajectories --max_steps 150 --eval_problems 0 --out out/sft-tiny
	$(BIN)/python eval.py curve --adapter out/sft-tiny/adapter --label SFT --split dev --n 128 --out out/sft-tiny/curve
	$(BIN)/python tools/compare.py runs out/tad-tiny out/sft-tiny --control SFT --out out/demo
	@$(BIN)/python -c "import time, torch; a, began = torch.rand(1024, 1024), time.time(); [a @ a for _ in range(200)]; \
	one = time.time() - began; whole = began - int(open('.venv/began').read()); \
	print(f'{whole:.0f} s, {whole / one:.0f} times as long as 200 products of two 1024 x 1024 matrices ({one:.2f} s)')"

test: .venv/test-ready
	$(BIN)/python -m pytest -rs -q -n auto --dist loadfile --no-loadscope-reorder tests

check: .venv/test-ready
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" tests

clean:
	rm -rf .venv out

.PHONY: demo test check clean
