"""HyperAlign in diffusers."""
