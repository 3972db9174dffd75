# Everything lands in .cache, which git ignores.
#   MULTIGPU_DIR=<checkout>  adds real ComfyUI-MultiGPU to the double that stands in for it (in the
#                            runs of tests/device, takes it instead)
#   GGUF_DIR=<checkout>      takes real ComfyUI-GGUF instead of its double
#   TORCH=<requirement>      another build of torch, with any options of pip
#   JOBS=<number>            how many test runs go side by side, each of about 1 GiB

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))
COMFYUI ?= 0.30.0 0.16.3
SMOKE ?= 0.27.0 0.24.0 0.20.1 0.18.2
CONTRACTS ?= 2.5.0 2.5.5
MULTIGPU_DIR ?=
GGUF_DIR ?=

PY := .cache/venv/bin/python
PYTEST := $(PY) -m pytest -q -p no:cacheprovider
READY := .cache/venv/ready
EACH_MULTIGPU := set -e; for multigpu in double:2.6.3 $(if $(MULTIGPU_DIR),"$(MULTIGPU_DIR)"); do
GGUF := $(if $(GGUF_DIR),--gguf "$(GGUF_DIR)")

export PYTHONDONTWRITEBYTECODE = 1
export HYPOTHESIS_STORAGE_DIRECTORY = .cache/hypothesis
export RUFF_CACHE_DIR = .cache/ruff

# One process boots one ComfyUI, so every combination is a run of its own, as are the tests that
# want simulated devices of another size. The longest come first.
RUNS := $(COMFYUI:%=host-%) $(COMFYUI:%=zoo-%) $(COMFYUI:%=server-%) large $(SMOKE:%=smoke-%) \
	$(CONTRACTS:%=contract-%) device simulated peers grid host-time unit simulator

.PHONY: test test-cuda zoo auto demo bench staging lint clean $(RUNS)

test: $(READY)
	$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=target $(RUNS)

unit simulator simulated large: $(READY)
	$(PYTEST) tests/$@

DEVICE := tests/device $(if $(MULTIGPU_DIR),--multigpu "$(MULTIGPU_DIR)") $(GGUF)

# What of the suite for real devices can be shown without one.
device: $(READY)
	$(PYTEST) $(DEVICE) --card simulated

# Fails where torch finds no CUDA device: nothing was tested then. It needs nothing of the network
# once .cache is there; without the venv: python3 -m pytest -q tests/device --card cuda
test-cuda: $(READY)
	$(PYTEST) $(DEVICE) --card cuda

# The versions also load the two custom nodes in either order.
$(COMFYUI:%=host-%): host-%: $(READY)
	$(EACH_MULTIGPU) \
		$(PYTEST) tests/host --comfyui $* --multigpu "$$multigpu" $(GGUF) \
			$(if $(filter $*,$(lastword $(COMFYUI))),--plugin-first); \
	done

$(COMFYUI:%=server-%): server-%: $(READY)
	$(EACH_MULTIGPU) \
		$(PYTEST) tests/server --comfyui $* --multigpu "$$multigpu"; \
	done

$(SMOKE:%=smoke-%): smoke-%: $(READY)
	$(EACH_MULTIGPU) \
		$(PYTEST) tests/host/test_split_and_run.py -k "bit_equal and (bytes or accelerators)" \
			--comfyui $* --multigpu "$$multigpu"; \
	done

# Every transformer of the host that is no Wan, small: that each runs, the same everywhere, and
# swapped. The check of a commit takes a part of it, on the newest host and the oldest.
zoo: $(READY)
	set -e; for version in $(COMFYUI); do $(PYTEST) tests/host/zoo --comfyui $$version; done

$(COMFYUI:%=zoo-%): zoo-%: $(READY)
	$(PYTEST) tests/host/zoo --comfyui $* -k "every_class_is_known or half or $(call FILES,$*)"

# Files of every kind take a minute: on the newest host only.
FILES = $(if $(filter $(firstword $(COMFYUI)),$(1)),every_file,control_net)

# `auto`: every cell of its grid, where the suite takes a sample, and 200 prompts instead of 24.
auto: $(READY)
	THOROUGH=1 $(PYTEST) tests/host/test_auto_grid.py --comfyui $(firstword $(COMFYUI))

# What older versions of MultiGPU leave for the plugin.
$(CONTRACTS:%=contract-%): contract-%: $(READY)
	$(PYTEST) tests/host/test_split_and_run.py -k "bit_equal and (bytes or accelerators or virtual)" \
		--comfyui 0.18.2 --multigpu double:$*

peers: $(READY)
	$(PY) bench/run.py --simulated --quick --models wan flux qwen --no-grid --limit 1.05 \
		--out .cache/bench

grid: $(READY)
	$(PY) bench/simulated_grid.py --limit 1.02

host-time: $(READY)
	$(PY) bench/host_time.py --limit-us 50

demo: $(READY)
	$(PY) tools/demo.py $(if $(MULTIGPU_DIR),--multigpu "$(MULTIGPU_DIR)")

bench: $(READY)
	$(PY) bench/run.py

# Wants a machine that does nothing else.
staging: $(READY)
	$(PY) bench/staging.py

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
