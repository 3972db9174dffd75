"""A tiny instance of every transformer model class of ComfyUI, and how each is called."""
