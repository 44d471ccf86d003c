# `make demo` and `make test` each work as the first command on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
READY_DEMO := .venv/.ready-demo
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# pytest-xdist: one worker for each core; tests/conftest.py sets the order of the tests
WORKERS ?= $(shell nproc)
# Some tests mount small disks. A user who is not root runs them in a namespace in which mounting is allowed.
SPACE := $(shell [ "$$(id -u)" = 0 ] || { unshare -rm true 2>/dev/null && echo unshare -rm; })
SPREAD := --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: demo slurm browser trackio eva test test-quick test-matrix test-gpu lint docs bench clean
demo: $(READY_DEMO)
	$(BIN)/unlabeled demo

# Tests kill real processes, measure their time and take resources from them. Tests that failed in the whole suite run
# once more, alone, and are listed. A bug of the product makes them fail again; if they pass now, there is a race that has
# to be found (CONTRIBUTING.md).
AGAIN := --last-failed --last-failed-no-failures none --maxfail 1 -vv
test: $(READY)
	@$(MAKE) --no-print-directory --jobs 3 --output-sync lint slurm browser trackio
	@$(SPACE) $(PYTEST) $(SPREAD) || { code=$$?; [ $$code = 1 ] || exit $$code; \
	  echo "These tests failed in the whole suite. They run once more, one after the other:"; \
	  $(SPACE) $(PYTEST) $(AGAIN) && echo "FAILED ONCE, PASSED ALONE: the tests above. Each is a race to be found and mended."; }

# install Debian's packages of Slurm, for tests/launch/test_slurm.py, and of network namespaces, for
# tests/faults/test_network.py: as root only; SLURM=no skips this
SLURM ?= yes
slurm: $(READY)
	@[ "$(SLURM)" = no ] || { $(BIN)/python -m tests.slurm && $(BIN)/python -m tests.hosts; }

# install Debian's Chromium, for tests/eval/test_browser.py: as root only; after `slurm`, because only one apt-get can run
browser: slurm
	@$(BIN)/python -m tests.browser

# install Trackio, for tests/launch/test_trackers.py, in a folder of its own and without the packages that are installed
# already: its versions require pillow < 13
trackio: $(READY)
	@[ -d .venv/trackio ] || $(PIP) --no-deps --target .venv/trackio trackio==0.43.0 gradio-client==2.7.2 orjson==3.13.0 \
	  python-multipart==0.0.34 brotli==1.2.1 || echo "tests of Trackio will be SKIPPED: it cannot be installed"

# install eva, for tests/eval/test_eva_model.py, in a folder of its own and without the packages that are installed
# already; jsonargparse 4.53 does not accept eva's configs
eva: $(READY)
	@[ -d .venv/eva ] || $(PIP) --no-deps --target .venv/eva kaiko-eva==0.4.5 lightning==2.6.6 jsonargparse==4.40.0 \
	  loguru==0.7.3 toolz==1.2.0 tenacity==9.2.1 pyzipper==0.4.0 pycryptodomex==3.24.2 nibabel==5.4.2 h5py==3.16.0 \
	  scikit-image==0.26.0 lazy_loader==0.6 imageio==2.38.1 tifffile==2026.3.3 monai==1.6.1 openslide-python==1.4.7 \
	  openslide-bin==4.0.1.2 imagesize==2.0.1 einops==0.8.2 medmnist==3.0.2 gdown==6.5.1 beautifulsoup4==4.15.0 soupsieve==4.1.3 \
	  || echo "tests of eva will be SKIPPED: it cannot be installed"

test-quick: $(READY)
	$(SPACE) $(PYTEST) $(SPREAD) -m "not slow"

# the cases that `make test` leaves out: it tests each property with one objective, mode or recipe, this with all others
test-matrix: $(READY) slurm browser eva
	$(SPACE) $(PYTEST) $(SPREAD) --matrix -m matrix

# tests that need a GPU; fails at once on a machine without one
test-gpu: $(READY)
	$(PYTEST) tests/gpu --device cuda

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages of docs/ as a site in site/; a broken link is an error
docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

# make bench BENCH=steps runs benchmarks/steps.py; one JSON line per figure
bench: $(READY)
	$(BIN)/python benchmarks/$(BENCH).py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unlabeled needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv

# for development: all pinned packages. Modules are compiled to bytecode when they are imported, because many never are.
$(READY): requirements.txt pyproject.toml | $(BIN)/python
	$(PIP) --no-compile -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@ $(READY_DEMO)

# for the demo: only the packages that it needs, with the same pinned versions
$(READY_DEMO): requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing what the demo needs into .venv (2 to 3 minutes)"
	@$(PIP) --no-compile --constraint requirements.txt setuptools
	@$(PIP) --no-compile --constraint requirements.txt --no-build-isolation --editable '.[demo]'
	touch $@

clean:
	rm -rf .venv runs site
