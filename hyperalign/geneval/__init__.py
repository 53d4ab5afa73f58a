"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): objects, counts, colours and positions, judged by rules.

`rules` judges what was detected, `detector` and `colors` detect, `scorer` joins them, `summary` adds up;
`python -m hyperalign.geneval` does a folder. It is for evaluation: it has no gradient.
"""
