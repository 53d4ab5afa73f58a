"""Audits rewards over pictures and prompts: `python -m hyperalign.rewards.audit`. It needs Pillow."""
