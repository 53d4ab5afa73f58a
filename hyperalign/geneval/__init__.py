"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): objects, counts, colours and positions, evaluated by rules.

`detector` and `colors` detect, `rules` evaluates the detections, `scorer` combines them, `summary` computes
the metrics; `python -m hyperalign geneval` evaluates a folder. It has no gradient.
"""
