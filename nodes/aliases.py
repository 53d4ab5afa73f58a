"""Other names under which ComfyUI's node search finds a node."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

# `search_aliases` was added in 2026; the Schema of an older ComfyUI would reject it.
HOST_HAS_ALIASES = "search_aliases" in {field.name for field in fields(io.Schema)}


def aliases(*names: str) -> dict[str, Any]:
    """Returns keyword arguments for `io.Schema`; none where the host does not support aliases."""
    return {"search_aliases": list(names)} if HOST_HAS_ALIASES else {}
