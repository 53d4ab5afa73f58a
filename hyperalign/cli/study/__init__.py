"""Blind side-by-side studies of images: `python -m hyperalign study`."""
