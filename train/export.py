"""Turns a training checkpoint into a hypernetwork; needs no base model.

python train/export.py --checkpoint runs/sd15_s/checkpoints/step-000100.pt --out mine.safetensors
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # `python train/export.py` puts train/ on the path, where train.py would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro

from hyperalign import checkpoint
from hyperalign.card import write_card
from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, check_writable
from train.checkpoints import read_checkpoint


@dataclass(frozen=True, slots=True)
class Options:
    """Which checkpoint, and which of its weights."""

    checkpoint: Path
    """The training checkpoint, a file step-NNNNNN.pt of a run's folder `checkpoints`."""
    out: Path
    """The .safetensors file to write; its model card comes beside it."""
    raw: bool = False
    """The weights of that step themselves, not their average, which validations and the run's result take."""


def export(options: Options) -> Path:
    """Writes the hypernetwork and its model card; returns its path.

    Raises:
        HyperAlignError: the checkpoint cannot be read, has no header or infinite weights, or the path cannot
            be written to.
    """
    if options.out.suffix != ".safetensors":
        raise HyperAlignError(f"--out is {options.out}; expected a file that ends in .safetensors.")
    check_writable(options.out)
    state = read_checkpoint(options.checkpoint)
    if "header" not in state:
        raise HyperAlignError(
            f"{options.checkpoint} was saved by a release that kept no header in training checkpoints, so "
            "nothing says which base model it fits. Resume its run with the command that it was started "
            "with: every checkpoint from then on has one."
        )
    header = checkpoint.parse_header(state["header"], options.checkpoint)
    weights = state["network" if options.raw else "average"]
    if bad := checkpoint.not_finite(weights):
        raise HyperAlignError(
            f"{options.checkpoint} holds NaN or infinite weights ({bad[0]}, {len(bad)} tensors): the "
            "training diverged. Take an earlier checkpoint."
        )
    if options.raw:
        header = dataclasses.replace(header, training=header.training | {"weights": "raw, not averaged"})
    with torch.device("meta"):
        network = checkpoint.new_network(header)
    network.load_state_dict(weights, assign=True)
    with cannot_write(options.out, "Make room, or choose another path."):
        checkpoint.save(options.out, network, header)
    write_card(options.out, header)
    return options.out


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        print(f"Wrote {export(options)}")
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
