"""Checks and cost estimates of a recipe before it runs."""
