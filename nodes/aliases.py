"""Other words under which the page's search finds a node."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

# The field came in 2026; an older host's Schema would refuse it.
HOST_HAS_ALIASES = "search_aliases" in {field.name for field in fields(io.Schema)}


def aliases(*words: str) -> dict[str, Any]:
    """Returns what to pass to `io.Schema`; nothing where the host knows no aliases."""
    return {"search_aliases": list(words)} if HOST_HAS_ALIASES else {}
