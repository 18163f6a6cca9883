# make reproduce [METHOD=simclr] [PRESET=quickstart] [ARGS="--epochs 10"]     train, evaluate, report
# make study NAME=augmentation [ARGS="--plan"]                               a question, answered with runs: see studies/
# make test                                                                  the tests, as CI runs them
# make soak                                                                  many SIGKILLs and resumes, a few minutes
# make bench                                                                 speed of views, step and loading, by hand
METHOD ?= simclr
NAME ?=
PRESET ?= quickstart
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: reproduce study test soak bench lint

reproduce: .venv/ready
	$(BIN)/python -m methods.$(METHOD).train $(PRESET) $(ARGS)

study: .venv/ready
	$(BIN)/python -m studies $(NAME) $(ARGS)

test: .venv/ready lint
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "not soak"

soak: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m soak

lint: .venv/ready
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m benchmarks.views
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.mae
	$(BIN)/python -m benchmarks.loading

.venv/ready: requirements.txt ci/setup
	PYTHON=$(PYTHON) bash ci/setup
