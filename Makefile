# make reproduce [METHOD=simclr] [PRESET=quickstart] [ARGS="--epochs 10"]     train, evaluate, report
# make study NAME=augmentation [ARGS="--plan"]                               a question, answered with runs: see studies/
# make compare METHODS="simclr byol" [PRESET=quickstart] [SEEDS=3]            the same for several methods, then one table
# make fork FROM=simclr TO=mine                                             a method of your own, with its tests
# make test                                                                  the tests, as CI runs them
# make soak                                                                  many SIGKILLs, resumes and odd numbers: two hours
# make bench                                                                 speed of views, step and loading, by hand
METHOD ?= simclr
METHODS ?= simclr byol
SEEDS ?= 1
NAME ?=
PRESET ?= quickstart
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: reproduce compare study fork test soak bench lint

reproduce: .venv/ready
	$(BIN)/python -m methods.$(METHOD).train $(PRESET) $(ARGS)

compare: .venv/ready
	$(BIN)/python -m studies.compare --methods $(METHODS) --preset $(PRESET) --seeds $(SEEDS) $(ARGS)

study: .venv/ready
	$(BIN)/python -m studies $(NAME) $(ARGS)

fork: .venv/ready
	@$(BIN)/python ci/fork $(FROM) $(TO)
	@$(BIN)/ruff check --fix --quiet methods/$(TO) tests/test_$(TO).py
	@$(BIN)/ruff format --quiet methods/$(TO) tests/test_$(TO).py

test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist loadgroup

soak: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m soak

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks.views
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.mae
	$(BIN)/python -m benchmarks.loading

.venv/ready: requirements.txt ci/setup
	PYTHON=$(PYTHON) bash ci/setup
