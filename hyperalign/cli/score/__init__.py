"""Scores whole folders of pictures: `python -m hyperalign score`. Its modules need Pillow."""
