"""Makes ``rig`` (the test rig) and ``block_swap`` (this plugin) importable without ComfyUI."""

import sys
import types
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = "block_swap"

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

if PACKAGE not in sys.modules:
    # The package without its __init__, which joins a ComfyUI that unit tests do not have.
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(TESTS.parent)]
    sys.modules[PACKAGE] = package
