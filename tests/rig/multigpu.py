"""Which ComfyUI-MultiGPU a test runs with: a checkout, or the double, which honours one version."""

import os
import re
from pathlib import Path

RIG = Path(__file__).parent
DEFAULT = "double:2.6.3"
HELP = "a checkout of ComfyUI-MultiGPU, or double:VERSION"


def package(option: str) -> tuple[Path, tuple[int, ...]]:
    """Return the folder and the version of the MultiGPU that `option` names."""
    kind, _, version = option.partition(":")
    if kind == "double":
        os.environ["MULTIGPU_DOUBLE_VERSION"] = version
        folder = RIG / "multigpu_double"
    else:
        folder = Path(option)
        project = (folder / "pyproject.toml").read_text(encoding="utf-8")
        version = re.search(r'^version = "([\d.]+)"', project, re.MULTILINE)[1]
    return folder, tuple(map(int, version.split(".")))
