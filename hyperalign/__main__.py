"""The commands of HyperAlign: `python -m hyperalign COMMAND`.

python -m hyperalign sample            run a workflow on a local ComfyUI and save its pictures
python -m hyperalign.study             make a page for a blind study of pictures, and count its votes
python -m hyperalign.rewards.score     score a folder of pictures
python -m hyperalign.rewards.geneval   score a folder as GenEval does
python -m hyperalign.rewards.audit     see what a reward prefers
python -m hyperalign.card              the model card of a hypernetwork
python -m hyperalign.hosts.diffusers_export   one moment of a hypernetwork as a plain LoRA

Each says more with --help.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from .workflows import sample


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(__doc__ or "")
        return 0
    if arguments[0] == "sample":
        return sample.main(arguments[1:])
    sys.stderr.write(f"error: found the command {arguments[0]!r}, expected sample.\n\n{__doc__}")
    return 2


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)  # so that a ComfyUI it started ends too
    sys.exit(main(sys.argv[1:]))
