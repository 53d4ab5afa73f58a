"""ComfyUI's entry into the pack. Nothing is imported before ComfyUI asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes.extension import HyperAlignExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> HyperAlignExtension:
    """Returns the extension with all nodes."""
    from .nodes.extension import HyperAlignExtension

    return HyperAlignExtension()
