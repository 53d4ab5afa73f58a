"""The device that a command computes on."""

from __future__ import annotations

import torch

from ...errors import HyperAlignError
from ...files import first_line


def device_of(name: str | None) -> torch.device:
    """Returns a device, by default the GPU if there is one. Raises HyperAlignError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise HyperAlignError(
            f"There is no device {name!r} ({first_line(error)}); give cpu, or omit --device."
        ) from error
