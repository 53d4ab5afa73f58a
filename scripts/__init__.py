"""Set-up, demo and test commands. They run on the standard library until `.venv` is up."""
