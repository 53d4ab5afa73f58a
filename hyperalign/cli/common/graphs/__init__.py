"""Where a ComfyUI graph has its prompts: the texts behind the conditioning of its samplers."""
