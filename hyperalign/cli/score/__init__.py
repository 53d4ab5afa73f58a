"""Scores folders of images with reward models: `python -m hyperalign score`."""
