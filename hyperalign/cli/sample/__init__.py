"""Workflow files run in a ComfyUI over its HTTP interface; the standard library is all this needs."""
