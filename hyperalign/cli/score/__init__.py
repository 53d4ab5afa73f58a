"""Scores whole folders of images: `python -m hyperalign score`. Its modules need Pillow."""
