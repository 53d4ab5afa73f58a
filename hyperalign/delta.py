"""The low-rank weight change of one adapted layer, as pure functions.

A layer with frozen weight W computes for each sample ``y = W x + s B_aux K A_aux x``. A_aux and B_aux are
learned and shared by all samples; the core ``K = B_hyper A_hyper`` is generated for each sample (Eq 7). At
run time the change is two products, ``y += (x down) up`` with ``down = (K A_aux)^T`` and ``up = s B_aux^T``.

Shape letters: B samples, N tokens, I input features, O output features, A = a, D = b, R = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def core_matrix(b_hyper_DR: Tensor, a_hyper_RA: Tensor) -> Tensor:
    """Returns K = B_hyper A_hyper, (..., b, a), of rank at most r."""
    return b_hyper_DR @ a_hyper_RA


def down_matrix(a_aux_AI: Tensor, core_BDA: Tensor) -> Tensor:
    """Returns (K A_aux)^T, (..., I, b): made once a generation, for all tokens and steps that it serves."""
    return (core_BDA @ a_aux_AI).transpose(-1, -2)


def up_matrix(b_aux_OD: Tensor, strength: float) -> Tensor:
    """Returns s B_aux^T, (..., b, O)."""
    return (strength * b_aux_OD).transpose(-1, -2)


def add_delta_(y_BNO: Tensor, x_BNI: Tensor, down_BID: Tensor, up_BDO: Tensor) -> None:
    """Adds (x down) up to the layer's output in place, in two products; `up` is one matrix, seen B times."""
    if x_BNI.dtype is y_BNO.dtype is up_BDO.dtype:
        y_BNO.baddbmm_(torch.bmm(x_BNI, down_BID), up_BDO)
    else:  # autocast, and layers that compute in another precision than that of their input
        y_BNO += torch.bmm(torch.bmm(x_BNI.to(down_BID), down_BID), up_BDO).to(y_BNO)


def merged_delta(a_aux_AI: Tensor, b_aux_OD: Tensor, core_DA: Tensor) -> Tensor:
    """Returns the weight change B_aux K A_aux of one sample, (..., O, I)."""
    return b_aux_OD @ core_DA @ a_aux_AI


def plain_lora(
    a_aux_AI: Tensor, b_aux_OD: Tensor, a_hyper_RA: Tensor, b_hyper_DR: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns one sample's change as an ordinary LoRA: down (..., R, I) and up (..., O, R)."""
    return a_hyper_RA @ a_aux_AI, b_aux_OD @ b_hyper_DR
