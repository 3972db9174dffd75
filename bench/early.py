"""Loads comfy-aimdo's library before torch is imported, as ComfyUI's main.py does."""

AIMDO, WHY_NOT = None, "comfy-aimdo has nothing for this machine"

try:
    import comfy_aimdo.control

    if comfy_aimdo.control.detect_vendor() and comfy_aimdo.control.init():
        AIMDO = comfy_aimdo.control
except Exception as error:  # what a library of another vendor raises is a reason, whatever it is
    WHY_NOT = f"comfy-aimdo: {error!r}"
