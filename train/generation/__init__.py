"""Draws the images of a prompt list: what `train/generate.py` runs."""
