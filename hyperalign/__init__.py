"""HyperAlign's host-free core: a hypernetwork that generates low-rank weights while a model samples.

After "HyperAlign" (arXiv 2601.15968). `attach` is all that a diffusers pipeline needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from .checkpoint import HyperAlign
    from .hosts.diffusers.session import Session
    from .hosts.merging import Merging
    from .schedule import Variant

__all__ = ["attach"]


def attach(
    pipe: Any,
    hyperalign: HyperAlign | Path | str,
    strength: float = 1.0,
    variant: Variant | Literal["auto"] = "auto",
    merging: Merging = "auto",
    capture: bool = False,
) -> Session:
    """Aligns a diffusers pipeline until `detach()`, or inside a `with` block; attaching again replaces.

    Args:
        pipe: a StableDiffusion, StableDiffusionXL, StableDiffusion3 or Flux pipeline; no weight is touched.
        hyperalign: a hypernetwork's file, or what `hyperalign.checkpoint.load` returned.
        strength: 0 is the base model bit for bit, 1 as trained.
        variant: when weights are generated: S at every evaluation, P at key times, I once; `auto` as trained.
        merging: `merged` gives each sample its own copy of the adapted layers' weights, `additive` adds the
            change to the layers' outputs, `auto` takes what is faster and fits.
        capture: replay the generations of variant S as a CUDA graph, where that is possible.

    Returns:
        The session: `detach()`, and `evaluations` and `generations` of the last run.

    Raises:
        HyperAlignError: another base model, a file that is no hypernetwork, or P without key times.
    """
    from .hosts.diffusers.session import attach as attach_to  # ComfyUI imports this package without diffusers

    return attach_to(pipe, hyperalign, strength, variant, merging, capture)
