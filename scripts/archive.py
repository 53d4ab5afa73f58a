"""What the registry's archive holds: what git tracks, less `.comfyignore`.

Standard library only.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from scripts.common import ROOT

NOT_IN_A_CLONE = {"build", "demo_output", "runs"}


def archive() -> list[Path]:
    """Returns the files that users install, relative to the repository; new ones of a checkout count too.

    Where git knows nothing, in an unpacked archive, these are all files but hidden and made ones.
    """
    if not (ROOT / ".git").exists():
        return [path for path in _everything() if not _made(path)]
    names = set(_listed("--exclude-standard")) - set(_listed("--ignored", "--exclude-from=.comfyignore"))
    return sorted(Path(name) for name in names if (ROOT / name).is_file())


def _listed(*options: str) -> Iterable[str]:
    command = ["git", "-c", "core.quotePath=off", "ls-files", "-z", "--cached", "--others", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return filter(None, done.stdout.split("\0"))


def _everything() -> Iterable[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())


def _made(path: Path) -> bool:
    hidden = any(part.startswith(".") or part.endswith(("__pycache__", ".egg-info")) for part in path.parts)
    return hidden or path.parts[0] in NOT_IN_A_CLONE
