"""HyperAlign in ComfyUI."""
