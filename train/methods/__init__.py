"""Training methods: each in a file of its own, behind `Method` of step.py."""
