"""Runs workflow files in a ComfyUI over its HTTP interface. Needs aiohttp and tqdm, which ComfyUI brings."""
