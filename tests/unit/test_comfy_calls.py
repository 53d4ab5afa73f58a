"""The arguments of the host's apply_model, as its own sampler and other packs pass them."""

from __future__ import annotations

import torch

from hyperalign.hosts.comfy.calls import text_of


def test_the_text_is_found_by_place_and_by_name() -> None:
    x, sigma, text = torch.zeros(2, 4, 8, 8), torch.ones(2), torch.zeros(2, 77, 768)
    assert text_of((x, sigma, None, text, None, {}), {}) is text
    assert text_of((x, sigma), {"c_crossattn": text}) is text
