"""What several commands share. Its modules need Pillow, Jinja, SciPy or tqdm."""
