"""Blind side-by-side studies of pictures: `python -m hyperalign study`. Making a page needs Pillow."""
