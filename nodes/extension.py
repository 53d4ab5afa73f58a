"""The list of nodes, and what happens once at start-up."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..hyperalign.hosts.comfy import files as comfy_files
from ..hyperalign.hosts.comfy import reward_files as comfy_reward_files
from .best_of_n import HyperAlignBestOfN
from .compare import HyperAlignCompare
from .export import HyperAlignExportLora
from .guidance import HyperAlignGuidance
from .hypernetwork import HyperAlignApply, HyperAlignLoader
from .rewards import HyperAlignRewardLoader, HyperAlignRewardScore
from .sampler import HyperAlignSampler
from .selection import HyperAlignSelect
from .strength import HyperAlignStrength
from .tiny import HyperAlignTinyLatent, HyperAlignTinyModel
from .trace import HyperAlignTrace, HyperAlignTracePca


class HyperAlignExtension(ComfyExtension):
    """HyperAlign's nodes."""

    async def on_load(self) -> None:
        """Tells the host where hypernetworks and rewards lie."""
        _register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Returns every node class."""
        _register_folders()  # ComfyUI 0.3.75 never calls on_load, and the loader's dropdown needs them
        return [
            HyperAlignLoader,
            HyperAlignApply,
            HyperAlignSampler,
            HyperAlignStrength,
            HyperAlignTrace,
            HyperAlignTracePca,
            HyperAlignExportLora,
            HyperAlignRewardLoader,
            HyperAlignRewardScore,
            HyperAlignSelect,
            HyperAlignBestOfN,
            HyperAlignGuidance,
            HyperAlignCompare,
            HyperAlignTinyModel,
            HyperAlignTinyLatent,
        ]


def _register_folders() -> None:
    comfy_files.register_folders()
    comfy_reward_files.register_folder()
