"""What has to happen before torch is imported: an allocator is chosen, comfy-aimdo is loaded.

PyTorch reads its choice of an allocator as its libraries are loaded, which ComfyUI's cuda_malloc.py
heeds, and comfy-aimdo hooks the allocations of what comes after it, as in ComfyUI's main.py.
"""

import argparse
import os
import sys

ALLOCATORS = {"native": "native", "async": "cudaMallocAsync"}  # as PyTorch names them
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second from 2.9 on

AIMDO, WHY_NOT = None, "comfy-aimdo has nothing for this machine"


def _choose_allocator() -> None:
    """Set what ``--allocator`` asks for, beside the options that the user has set."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allocator")
    backend = ALLOCATORS.get(parser.parse_known_args()[0].allocator)
    if backend is None:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: it has an allocator")
    given = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    kept = [option for option in given.split(",") if option.split(":")[0].strip() != "backend"]
    text = ",".join([*filter(None, kept), f"backend:{backend}"])
    os.environ.update(dict.fromkeys(VARIABLES, text))


_choose_allocator()

try:
    import comfy_aimdo.control

    if comfy_aimdo.control.detect_vendor() and comfy_aimdo.control.init():
        AIMDO = comfy_aimdo.control
except Exception as error:  # what a library of another vendor raises is a reason, whatever it is
    WHY_NOT = f"comfy-aimdo: {error!r}"
