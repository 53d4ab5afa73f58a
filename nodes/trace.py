"""Images of what a hypernetwork did during sampling."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.hosts.comfy import trace as comfy_trace
from ..hyperalign.trace import as_json
from ..hyperalign.trace_pca import spread_of
from .aliases import aliases
from .sockets import HyperAlignTraceType, RewardType
from .trace_image import trace_image
from .trace_pca_image import trace_pca_image

SOCKETS = 8


class HyperAlignTrace(io.ComfyNode):
    """Draws one run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignTrace",
            display_name="HyperAlign Trace",
            category="HyperAlign",
            **aliases("plot", "visualize", "debug", "analyze weights"),
            description="Shows what HyperAlign did while an image was drawn: how strong the weights were in each "
            "block at each step, how far they moved from the first ones, when they were written anew, and with a "
            "reward how good the image was foreseen to be.",
            is_output_node=True,
            inputs=_trace_inputs(),
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image shown in the node."),
                io.String.Output(
                    display_name="json", tooltip="All numbers of the image, for each row, as JSON."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, trace: Any, latent: Any = None, reward: Any = None, vae: Any = None, prompt: str = ""
    ) -> io.NodeOutput:
        """Returns the image and its numbers, and shows the image."""
        run = comfy_trace.select(trace, latent).trace()
        rewards = None if reward is None else comfy_trace.judge(run, vae, reward, prompt)
        image, numbers = trace_image(run, rewards), json.dumps(as_json(run, rewards))
        return io.NodeOutput(image, numbers, ui=ui.PreviewImage(image, cls=cls))


class HyperAlignTracePca(io.ComfyNode):
    """Draws how the weights of several images differ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignTracePca",
            display_name="HyperAlign Trace PCA",
            category="HyperAlign",
            **aliases("plot", "visualize", "principal components", "scatter"),
            description="Shows how the weights that HyperAlign writes differ over prompts and seeds, step by step: one "
            "point for each image, in the plane of the two principal components of all of them.",
            is_input_list=True,
            is_output_node=True,
            inputs=_pca_inputs(),
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image shown in the node."),
                io.String.Output(display_name="json", tooltip="The points and their spread as JSON."),
            ],
        )

    @classmethod
    def execute(cls, latents: Any = None, **traces: Any) -> io.NodeOutput:
        """Returns the image and its numbers, and shows the image."""
        recorders = [recorder for name in _trace_names() for recorder in traces.get(name) or []]
        if any(recorder is None for recorder in recorders):
            raise HyperAlignError("A trace is missing. Connect the trace output of Apply or Sampler.")
        runs = [recording.trace() for recording in comfy_trace.select_all(recorders, latents or [])]
        spread = spread_of(runs)
        image, numbers = trace_pca_image(spread), json.dumps(spread.as_json())
        return io.NodeOutput(image, numbers, ui=ui.PreviewImage(image, cls=cls))


def _trace_inputs() -> list[io.Input]:
    return [
        HyperAlignTraceType.Input("trace", tooltip="From Apply HyperAlign or HyperAlign Sampler."),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="The LATENT that was sampled. Needed with Apply HyperAlign: its trace is filled while a sampler "
            "runs, so this node must wait for that sampler. HyperAlign Sampler's trace needs none.",
        ),
        RewardType.Input(
            "reward",
            optional=True,
            tooltip="From Reward Model Loader: judges the image foreseen at each step, which needs vae and prompt. "
            "Nothing connected = no such curve.",
        ),
        io.Vae.Input(
            "vae", optional=True, tooltip="The model's VAE; decodes the images that the reward judges."
        ),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            optional=True,
            tooltip="What the reward judges against: one line for all images of a batch, or one line per image. "
            "0 lines = the empty prompt. Unused without a reward.",
        ),
    ]


def _trace_names() -> list[str]:
    return [f"trace_{place}" for place in range(1, SOCKETS + 1)]


def _pca_inputs() -> list[io.Input]:
    first, *others = _trace_names()
    return [
        HyperAlignTraceType.Input(
            first,
            tooltip="From HyperAlign Sampler or Apply HyperAlign: one, or a list. Each image of a batch is a point.",
        ),
        *(
            HyperAlignTraceType.Input(
                name, optional=True, tooltip="A further trace of the same hypernetwork, with the same steps."
            )
            for name in others
        ),
        io.Latent.Input(
            "latents",
            optional=True,
            tooltip="The LATENTs that were sampled, as one or a list. Needed with Apply HyperAlign: its trace is filled "
            "while samplers run, so this node must wait for them.",
        ),
    ]
