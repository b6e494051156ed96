# make pretrain [DATA=folder] [RECIPE=demo] [OUTPUT=runs/...] [ARGS="any flag of pipelines/pretrain.py"]
# make finetune, make segment, make detect and make sweep likewise, with PRETRAINED=run or weights; both start from the demo's checkpoint otherwise
# Every target sets up .venv itself when it is missing or older than pyproject.toml or constraints.txt.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RECIPE ?= demo
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup pretrain finetune segment detect sweep test test-all lint format bench drill ui screenshots clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## make or refresh .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

pretrain: $(READY)  ## pretrain RECIPE on DATA (default: the demo on built-in moths)
	$(BIN)/python pipelines/pretrain.py $(RECIPE) $(if $(DATA),--data "$(DATA)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

finetune segment detect sweep: PRETRAINED ?= runs/demo

finetune: RECIPE = demo_finetune
finetune: $(READY)  ## finetune the checkpoint of make pretrain, or PRETRAINED, with RECIPE on DATA
	$(BIN)/python pipelines/finetune.py $(RECIPE) --pretrained "$(PRETRAINED)" $(if $(DATA),--data "$(DATA)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

segment: RECIPE = demo_segment
segment: $(READY)  ## teach the same checkpoint, or PRETRAINED, to find the class of every pixel of DATA (default: built-in scenes)
	$(BIN)/python pipelines/segment.py $(RECIPE) --pretrained "$(PRETRAINED)" $(if $(DATA),--data "$(DATA)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

detect: RECIPE = demo_detect
detect: $(READY)  ## teach the same checkpoint, or PRETRAINED, to find the objects of DATA (default: built-in scenes)
	$(BIN)/python pipelines/detect.py $(RECIPE) --pretrained "$(PRETRAINED)" $(if $(DATA),--data "$(DATA)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

SPACE ?= demo
# A space of pretraining starts from nothing, and it and one of detection have no model to register. These print nothing.
FINETUNES = $(shell $(BIN)/python -c 'from tune_spaces import SPACES; "$(SPACE)" in SPACES and SPACES["$(SPACE)"].pretrains or print("yes")')
REGISTERS = $(shell $(BIN)/python -c 'from tune_spaces import SPACES; "$(SPACE)" in SPACES and not SPACES["$(SPACE)"].registers or print("yes")')
sweep: $(READY)  ## try the settings of SPACE (default: the demo, 6 short trials of finetuning the same checkpoint)
	$(BIN)/python pipelines/sweep.py $(SPACE) $(if $(FINETUNES),--pretrained "$(PRETRAINED)") $(if $(REGISTERS),--register-model "mixmae-$(SPACE)") $(if $(DATA),--data "$(DATA)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

# One process for the tests that start Ray, and one for each other core, up to three, for the rest (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --no-loadscope-reorder
test: $(READY)  ## the fast tests
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(READY)  ## all tests that need no GPU
	$(PYTEST) -m "not gpu" $(ARGS)

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## how fast images come in, beside the peers and the decoder's limit (about 5 minutes, on quiet cores)
	$(BIN)/python benchmarks/ingest.py $(ARGS)

drill: $(READY)  ## break a small run in every way we know, and see whether it ends with the same weights (about 30 minutes)
	$(BIN)/python benchmarks/drill.py $(ARGS)

ui: $(READY)  ## open MLflow's pages of the runs under runs/
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db

screenshots: $(READY)  ## take docs/images/mlflow_*.png of the sweep that make sweep ran (needs Debian's chromium)
	SWEEP=runs/sweep_demo SCREENSHOTS=docs/images $(BIN)/python -m pytest -q tests/ray/test_mlflow_ui.py

clean:  ## remove caches and .venv; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
