"""The factorised low-rank weight change, as pure functions.

An adapted module with frozen W computes ``y = W x + s * B_aux (K (A_aux x))``. A_aux and B_aux are
learned and shared by all rows; the core ``K = B_hyper A_hyper`` is generated for every row.

Shape letters: B rows, N tokens, I input features, O output features, A = a, D = b, R = rank.
"""

from __future__ import annotations

from torch import Tensor


def core_matrix(b_hyper_DR: Tensor, a_hyper_RA: Tensor) -> Tensor:
    """Returns K = B_hyper A_hyper, (..., b, a) of rank at most r."""
    return b_hyper_DR @ a_hyper_RA


def forward_delta(x_BNI: Tensor, a_aux_AI: Tensor, b_aux_OD: Tensor, core_BDA: Tensor) -> Tensor:
    """Returns B_aux (K (A_aux x)) as (B, N, O), each row with its own core.

    Two GEMMs are shared by all rows and the per-row product is only b x a wide, so no row ever
    needs a d_out x r matrix of its own.
    """
    u_BNA = x_BNI @ a_aux_AI.T
    v_BND = u_BNA @ core_BDA.transpose(-1, -2)
    return v_BND @ b_aux_OD.T


def folded(a_aux_AI: Tensor, core_BDA: Tensor) -> Tensor:
    """Returns K A_aux, (..., b, I): a row's whole way down, made once for all layers of a forward."""
    return core_BDA @ a_aux_AI


def add_delta_(y_BNO: Tensor, x_BNI: Tensor, down_BID: Tensor, up_DO: Tensor) -> None:
    """Adds (x down) up to y in place: `forward_delta` of a folded core, in two products."""
    if x_BNI.dtype == y_BNO.dtype == up_DO.dtype:
        v_BND = x_BNI @ down_BID
        y_BNO.view(-1, y_BNO.shape[-1]).addmm_(v_BND.flatten(0, 1), up_DO)
    else:  # autocast, and layers that compute in another precision than they take
        y_BNO += (x_BNI.to(down_BID) @ down_BID @ up_DO).to(y_BNO)


def merged_delta(a_aux_AI: Tensor, b_aux_OD: Tensor, core_DA: Tensor) -> Tensor:
    """Returns the weight change B_aux K A_aux of one row, (..., O, I)."""
    return b_aux_OD @ core_DA @ a_aux_AI


def plain_lora(
    a_aux_AI: Tensor, b_aux_OD: Tensor, a_hyper_RA: Tensor, b_hyper_DR: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns one row's change as an ordinary LoRA: down (..., R, I) and up (..., O, R)."""
    return a_hyper_RA @ a_aux_AI, b_aux_OD @ b_hyper_DR
