"""Watches what other packs' patches do to the batch of an attention. No host inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..rows import Rows

PATCHES = ("attn1_patch", "attn2_patch")
"""Lists of functions that change the inputs (q, k, v) of an attention; the host calls each in turn."""

Inputs = tuple[Tensor, Tensor, Tensor]


def watching(options: Mapping[str, Any], rows: Rows) -> Mapping[str, Any]:
    """Returns a call's transformer_options, in which `rows` learns what patches do if there are any."""
    patches: Mapping[str, Any] = options.get("patches", {})
    if not any(patches.get(name) for name in PATCHES):
        return options
    watch = _Watch(rows)
    watched = {name: [watch.before, *patches.get(name, ()), watch.after] for name in PATCHES}
    return {**options, "patches": {**patches, **watched}}


class _Watch:
    """The first and the last of an attention's patches."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._q_BNC: Tensor | None = None

    def before(self, q_BNC: Tensor, k: Tensor, v: Tensor, _: Any) -> Inputs:
        self._q_BNC = q_BNC
        return q_BNC, k, v

    def after(self, q_RNC: Tensor, k: Tensor, v: Tensor, _: Any) -> Inputs:
        """Keys and values belong to the queries' rows, whatever text they are made of."""
        before_BNC, self._q_BNC = self._q_BNC, None
        if before_BNC is None or len(q_RNC) == len(before_BNC):
            self._rows.forget()
        else:
            self._rows.compare(q_RNC, before_BNC)
        return q_RNC, k, v
