"""Audits reward models over images and prompts: `python -m hyperalign audit`."""
