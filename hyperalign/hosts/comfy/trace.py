"""Traces in ComfyUI: whether a node reads one, selecting a run, and the reward scores of its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import comfy.model_management
import comfy.utils
import torch
from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ...errors import HyperAlignError
from ...prompts import LINES, prompts_for
from ...trace import Rewards, Trace
from ..tracing import Recorder, Recording
from .rewards import HostReward

Latent = dict[str, Any]
Wanted = Literal["", "weights", "weights and predictions"]
WEIGHTS_ONLY = "HyperAlignTracePca"
"""The node that never reads predictions."""
WITH_REWARD = "HyperAlignTrace"
"""The node that reads predictions if a reward is connected."""


def wanted(output: int) -> Wanted:
    """Returns what the nodes linked to an output of the executing node need recorded.

    The host computes a node's fingerprint before it looks up a cached result, in the same context. With this
    value in the fingerprint, the node and its samplers run again when a link is added.
    """
    linked = list(_readers(output))
    if not linked:
        return ""
    if any(_may_read_predictions(node) for node in linked):
        return "weights and predictions"
    return "weights"


def recorder_for(output: int) -> Recorder | None:
    """Returns a recorder for an output of the executing node; None if it is not linked."""
    content = wanted(output)
    return Recorder(keeps_predictions=content == "weights and predictions") if content else None


def select(recorder: Recorder, latent: Latent | None) -> Recording:
    """Returns the run that sampled a LATENT, or the last run if `latent` is None. Raises HyperAlignError."""
    return recorder.select(None if latent is None else latent["samples"])


def select_all(recorders: Sequence[Recorder], latents: Sequence[Latent]) -> list[Recording]:
    """Returns every run that sampled one of the LATENTs; for recorders without such a run, the last one.

    Raises HyperAlignError if nothing was recorded.
    """
    found: list[Recording] = []
    for recorder in recorders:
        last = recorder.select()
        sampled = [r for r in recorder.recordings if any(r.is_of(latent["samples"]) for latent in latents)]
        found += [recording for recording in sampled or [last] if recording not in found]
    return found


def score_predictions(
    trace: Trace, vae: Any, reward: HostReward, prompt: str, lines: str = LINES[0]
) -> Rewards:
    """Returns the reward scores of each step's one-step prediction. Raises HyperAlignError."""
    if vae is None:
        raise HyperAlignError(
            "A reward is connected, but no vae; expected one to decode the predictions. Connect the "
            "model's VAE."
        )
    latents_EBCHW = trace.predictions_EBCHW
    if latents_EBCHW is None or latents_EBCHW.ndim != 5:
        raise HyperAlignError(
            "The trace contains no one-step predictions of images, which a reward needs. Connect the trace "
            "output directly to HyperAlign Trace; predictions of videos cannot be scored."
        )
    progress = comfy.utils.ProgressBar(len(latents_EBCHW))
    scores: list[list[float]] = []
    for latents_BCHW in latents_EBCHW:
        comfy.model_management.throw_exception_if_processing_interrupted()
        images_BHWC = vae.decode(latents_BCHW)
        scores.append(reward.score(images_BHWC, prompts_for(prompt, len(images_BHWC), lines)))
        progress.update(1)
    return Rewards(reward.name, torch.tensor(scores))


def _readers(output: int) -> Iterator[dict[str, Any]]:
    """Yields the nodes that an output of the executing node is linked to."""
    context, graph = get_executing_context(), get_progress_state().dynprompt
    if context is None:
        return
    for node_id in graph.all_node_ids():
        node = graph.get_node(node_id)
        if any(is_link(value) and value == [context.node_id, output] for value in node["inputs"].values()):
            yield node


def _may_read_predictions(node: dict[str, Any]) -> bool:
    """Returns whether a node, or a node after one of another pack, may read predictions."""
    if node["class_type"] == WITH_REWARD:
        return is_link(node["inputs"].get("reward"))
    return node["class_type"] != WEIGHTS_ONLY
