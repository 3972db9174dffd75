# Everything lands in .cache, which git ignores.
#   MULTIGPU_DIR=<checkout>  adds real ComfyUI-MultiGPU to the double that stands in for it
#   GGUF_DIR=<checkout>      adds real ComfyUI-GGUF
#   TORCH=<requirement>      another build of torch, with any options of pip

PYTHON ?= python3
TORCH ?= torch==2.13.0
COMFYUI ?= 0.30.0 0.16.3
SMOKE ?= 0.27.0 0.24.0 0.20.1 0.18.2
CONTRACTS ?= 2.5.0 2.5.5
MULTIGPU_DIR ?=
GGUF_DIR ?=

PY := .cache/venv/bin/python
PYTEST := $(PY) -m pytest -q -p no:cacheprovider
READY := .cache/venv/ready
GGUF := $(if $(GGUF_DIR),--gguf "$(GGUF_DIR)")

export PYTHONDONTWRITEBYTECODE = 1
export HYPOTHESIS_STORAGE_DIRECTORY = .cache/hypothesis
export RUFF_CACHE_DIR = .cache/ruff

.PHONY: test demo bench lint clean

# One process boots one ComfyUI, so every combination is a run of its own, as are the tests that
# want simulated devices of another size. The two versions also load the two custom nodes in either
# order. The server's tests run beside the others and are shown when both are done.
test: $(READY)
	$(PYTEST) tests/unit
	$(PYTEST) tests/simulator
	$(PYTEST) tests/simulated
	set -e; order=; for version in $(COMFYUI); do \
		for multigpu in double:2.6.3 $(if $(MULTIGPU_DIR),"$(MULTIGPU_DIR)"); do \
			$(PYTEST) tests/server --comfyui $$version --multigpu "$$multigpu" \
				> .cache/server.log 2>&1 & server=$$!; \
			$(PYTEST) tests/host --comfyui $$version --multigpu "$$multigpu" $(GGUF) $$order \
				|| { kill $$server; exit 1; }; \
			wait $$server || { cat .cache/server.log; exit 1; }; \
			cat .cache/server.log; \
		done; \
		order=--plugin-first; \
	done
	set -e; for version in $(SMOKE); do \
		$(PYTEST) tests/host/test_split_and_run.py -k bit_equal --comfyui $$version; \
	done
	set -e; for version in $(CONTRACTS); do \
		$(PYTEST) tests/host/test_split_and_run.py --multigpu double:$$version --comfyui 0.18.2; \
	done
	$(PY) bench/simulated_grid.py --limit 1.05

demo: $(READY)
	$(PY) tools/demo.py $(if $(MULTIGPU_DIR),--multigpu "$(MULTIGPU_DIR)")

bench: $(READY)
	$(PY) bench/simulated_grid.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# torch comes first and alone: nothing that depends on it may choose another build.
$(READY): tests/requirements.txt requirements.txt
	@echo "Installing into .cache/venv (about 2 GB with torch for the CPU)"
	$(PYTHON) -m venv .cache/venv
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf .cache
