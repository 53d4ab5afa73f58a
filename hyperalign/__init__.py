"""HyperAlign's host-free core: a hypernetwork that writes low-rank weights while a model samples.

After "HyperAlign" (arXiv 2601.15968).
"""
