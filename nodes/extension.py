"""The list of nodes, and the registration of model folders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..hyperalign.hosts.comfy import files, reward_files
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
        """Registers the folders of hypernetworks and reward models."""
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
    files.register_folders()
    reward_files.register_folder()
