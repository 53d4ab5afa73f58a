"""Audits rewards over pictures and prompts: `python -m hyperalign audit`. It needs Pillow."""
