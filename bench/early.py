"""Loads comfy-aimdo's library before torch is imported, as ComfyUI's main.py does."""

import contextlib

AIMDO = None

with contextlib.suppress(Exception):  # not installed, or nothing for this machine
    import comfy_aimdo.control

    if comfy_aimdo.control.detect_vendor() and comfy_aimdo.control.init():
        AIMDO = comfy_aimdo.control
