"""Makes ``rig`` (the test rig) and ``block_swap`` (this plugin) importable without ComfyUI."""

import os
import sys
import types
from pathlib import Path

import hypothesis

TESTS = Path(__file__).parent
PACKAGE = "block_swap"

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

if PACKAGE not in sys.modules:
    # The package without its __init__, which joins a ComfyUI that unit tests do not have.
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(TESTS.parent)]
    sys.modules[PACKAGE] = package

# The check of a commit has to give the same answer every time; by hand, every run tries others.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
