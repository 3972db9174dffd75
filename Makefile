# Everything lands in .cache, which git ignores. MULTIGPU_DIR=<checkout> adds real ComfyUI-MultiGPU.

PYTHON ?= python3
TORCH ?= torch==2.13.0
COMFYUI ?= 0.30.0 0.18.2
MULTIGPU_DIR ?=

PY := .cache/venv/bin/python
PYTEST := $(PY) -m pytest -q
READY := .cache/venv/ready

.PHONY: test demo bench lint clean

# One process boots one ComfyUI, so every combination is a run of its own, as are the tests that
# want simulated devices of another size. The two versions also load the two custom nodes in either
# order.
test: $(READY)
	$(PYTEST) tests/unit tests/simulator
	$(PYTEST) tests/simulated
	set -e; for version in $(COMFYUI); do \
		$(PYTEST) tests/host --comfyui $$version $$order; \
		if [ -n "$(MULTIGPU_DIR)" ]; then \
			$(PYTEST) tests/host --comfyui $$version --multigpu "$(MULTIGPU_DIR)" $$order; \
		fi; \
		order=--plugin-first; \
	done
	$(PY) bench/simulated_grid.py --limit 1.05 > .cache/simulated_grid.md

demo: $(READY)
	$(PY) tools/demo.py $(if $(MULTIGPU_DIR),--multigpu "$(MULTIGPU_DIR)")

bench: $(READY)
	$(PY) bench/simulated_grid.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# torch comes first and alone: nothing that depends on it may choose another build.
$(READY): tests/requirements.txt
	$(PYTHON) -m venv .cache/venv
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf .cache
