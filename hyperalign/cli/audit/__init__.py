"""Audits rewards over images and prompts: `python -m hyperalign audit`. It needs Pillow."""
