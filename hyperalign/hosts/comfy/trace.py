"""Traces inside ComfyUI: whether anybody wants one, which run is meant, and what a reward says of it."""

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
from ...trace import Rewards, Trace
from ..tracing import Recorder, Recording
from .rewards import HostReward, prompts_for

Latent = dict[str, Any]
Wanted = Literal["", "weights", "weights and predictions"]
WEIGHTS_ALONE = "HyperAlignTracePca"
MAY_JUDGE = "HyperAlignTrace"


def wanted(output: int) -> Wanted:
    """Returns what the nodes linked to an output of the executing node want recorded.

    The host asks for a node's fingerprint before it looks for a cached result, in the same context, so that a
    fingerprint with this in it makes the node and the samplers behind it run again once a link appears.
    """
    linked = list(_readers(output))
    if not linked:
        return ""
    if any(_may_judge(node) for node in linked):
        return "weights and predictions"
    return "weights"


def recorder_for(output: int) -> Recorder | None:
    """Returns a recorder of what is wanted of an output of the executing node; None if it is not linked."""
    what = wanted(output)
    return Recorder(keeps_predictions=what == "weights and predictions") if what else None


def select(recorder: Recorder, latent: Latent | None) -> Recording:
    """Returns the run that sampled a LATENT, or else the last one. Raises HyperAlignError."""
    return recorder.select(None if latent is None else latent["samples"])


def select_all(recorders: Sequence[Recorder], latents: Sequence[Latent]) -> list[Recording]:
    """Returns every run that sampled one of the LATENTs; of recorders without such a run the last one.

    Raises HyperAlignError if nothing was recorded.
    """
    found: list[Recording] = []
    for recorder in recorders:
        last = recorder.select()
        sampled = [r for r in recorder.recordings if any(r.is_of(latent["samples"]) for latent in latents)]
        found += [recording for recording in sampled or [last] if recording not in found]
    return found


def judge(trace: Trace, vae: Any, reward: HostReward, prompt: str) -> Rewards:
    """Returns what a reward says of each step's one-step prediction. Raises HyperAlignError."""
    if vae is None:
        raise HyperAlignError(
            "A reward is connected but no vae, which makes images of the steps. Connect it."
        )
    latents_EBCHW = trace.predictions_EBCHW
    if latents_EBCHW is None or latents_EBCHW.ndim != 5:
        raise HyperAlignError(
            "The trace holds no one-step predictions of images. Connect trace straight to HyperAlign "
            "Trace; video is not judged."
        )
    progress = comfy.utils.ProgressBar(len(latents_EBCHW))
    scores: list[list[float]] = []
    for latents_BCHW in latents_EBCHW:
        comfy.model_management.throw_exception_if_processing_interrupted()
        images_BHWC = vae.decode(latents_BCHW)
        scores.append(reward.score(images_BHWC, prompts_for(prompt, len(images_BHWC))))
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


def _may_judge(node: dict[str, Any]) -> bool:
    """Returns whether a node, or one behind a node that is not ours, may ask for predictions."""
    if node["class_type"] == MAY_JUDGE:
        return is_link(node["inputs"].get("reward"))
    return node["class_type"] != WEIGHTS_ALONE
