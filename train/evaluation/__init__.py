"""From folders of images to a table: what `train/evaluate.py` runs."""
