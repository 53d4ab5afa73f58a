"""Makes `.venv` with everything the demo and the tests need; a second call finds it done.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.common import ROOT, ScriptError, run_pip, say
from scripts.host_tree import FETCHED_TREE, comfyui_tree

VENV = ROOT / ".venv"
STAMP = VENV / "hyperalign-environment.sha256"
OLDEST_PYTHON = (3, 10)
FREE_GIGABYTES = 6
TORCH = "torch==2.13.0"
MATCHING_TORCHVISION = ["torchvision==0.28.*"]
# The last torchvision that still imports when its compiled operators do not fit the installed torch.
TOLERANT_TORCHVISION = ["--no-deps", "torchvision==0.15.2"]
# The newest: its operators are compiled for torch 2.11 and what comes after.
TORCHAUDIO = "torchaudio==2.11.0"
# Installed by hand, or of no use to a server without a browser's template gallery and audio nodes.
SKIPPED = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
# It asks for torchvision and would make pip replace the one chosen here; all else it needs is present.
WITHOUT_DEPENDENCIES = {"spandrel"}
# The reward tests' reference asks for torchvision too.
REFERENCES = ["open_clip_torch==3.3.0"]


def venv_python() -> Path:
    """Returns the environment's interpreter, on every platform."""
    return python_of(VENV)


def python_of(environment: Path) -> Path:
    """Returns the interpreter of a virtual environment, on every platform."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_environment() -> Path:
    """Makes or completes `.venv` and returns the ComfyUI tree it was made for.

    Raises:
        ScriptError: Python too old, disk too full, or an installation failed.
    """
    _check_python()
    if not STAMP.exists():
        _check_disk()
    if not venv_python().exists():
        _create_venv()
    tree = comfyui_tree(venv_python())
    digest = _digest(tree)
    if not STAMP.exists() or STAMP.read_text(encoding="utf-8").strip() != digest:
        _install(tree)
        STAMP.write_text(digest + "\n", encoding="utf-8")
        say("The environment is ready.")
    return tree


def enter_environment(script: Path) -> Path:
    """Makes sure that the running script has the environment's interpreter, then returns the ComfyUI tree.

    Called from outside, it makes the environment and starts the script over inside it.
    """
    if Path(sys.prefix).resolve() == VENV.resolve():
        return ensure_environment()
    ensure_environment()
    command = [str(venv_python()), str(script), *sys.argv[1:]]
    if os.name != "nt":
        os.execv(command[0], command)  # one process, so that signals reach it
    raise SystemExit(subprocess.call(command))


def _check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise ScriptError(
            f"This is Python {platform.python_version()}; HyperAlign needs 3.10 or newer (3.11 is tested): "
            "run the command with a newer python3."
        )


def _check_disk() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GIGABYTES:
        raise ScriptError(
            f"{ROOT} has {free:.1f} GB of free disk; the environment needs {FREE_GIGABYTES} GB: free some, "
            "or move the folder to a larger disk."
        )


def _create_venv() -> None:
    say(f"Creating {VENV} ...")
    result = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise ScriptError(
            "Python could not make .venv (on Debian and Ubuntu install python3-venv); it said: "
            + " ".join(lines[-3:])
        )


def _digest(tree: Path) -> str:
    """Returns a name for everything that decides what is installed; the tools' settings do not."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
    texts = (project, (tree / "requirements.txt").read_text(encoding="utf-8"))
    torch = (TORCH, MATCHING_TORCHVISION, TOLERANT_TORCHVISION, TORCHAUDIO)
    constants = repr((*torch, sorted(SKIPPED), REFERENCES))
    return hashlib.sha256("\0".join((*texts, constants)).encode()).hexdigest()


def _host_requirements(tree: Path) -> tuple[list[str], list[str]]:
    """Returns the host's requirements in two lists: to install with and without their dependencies."""
    together: list[str] = []
    alone: list[str] = []
    for line in (tree / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        name = re.split(r"[<>=~!;\[ ]", requirement)[0].lower()
        if name and name not in SKIPPED:
            (alone if name in WITHOUT_DEPENDENCIES else together).append(requirement)
    return together, alone


def _install(tree: Path) -> None:
    python = venv_python()
    together, alone = _host_requirements(tree)
    run_pip(python, ["install", TORCH], "PyTorch")
    project = ["--editable", f"{ROOT}[train,build,dev]"]
    run_pip(python, ["install", TORCH, *together, *project], "ComfyUI's requirements and the project's tools")
    run_pip(python, ["install", "--no-deps", *alone, *REFERENCES], " and ".join([*alone, *REFERENCES]))
    _install_torchvision(python)
    if tree != FETCHED_TREE:
        _install_torchaudio(python)


def _install_torchaudio(python: Path) -> None:
    """Installs torchaudio, without which ComfyUI 0.20 and newer do not start.

    Its compiled operators need CUDA's libraries, which a CPU build of torch lacks. It imports once they are
    gone and computes what it can with torch alone.
    """
    if _imports(python, "torchaudio"):
        return
    run_pip(python, ["install", "--no-deps", TORCHAUDIO], TORCHAUDIO)
    if not _imports(python, "torchaudio"):
        shutil.rmtree(_site_packages(python) / "torchaudio" / "lib")


def _site_packages(python: Path) -> Path:
    statement = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-c", statement], text=True).strip())


def _install_torchvision(python: Path) -> None:
    """Installs the first torchvision that imports beside the installed torch.

    A CPU build of torch on Linux is alone in its registry: the torchvision there is linked against
    CUDA, and recent ones then fail to import.
    """
    if _imports(python, "torchvision"):
        return
    candidates = [MATCHING_TORCHVISION, TOLERANT_TORCHVISION]
    if sys.platform == "linux" and not _imports(
        python, "torch; assert torch.version.cuda or torch.version.hip"
    ):
        candidates.reverse()
    failures: list[str] = []
    for candidate in candidates:
        try:
            run_pip(python, ["install", *candidate], candidate[-1])
        except ScriptError as error:
            failures.append(str(error).splitlines()[-1])
            continue
        if _imports(python, "torchvision"):
            return
        failures.append(f"{candidate[-1]} does not import")
    raise ScriptError(
        f"No torchvision works beside the installed {TORCH} ({'; '.join(failures)}): "
        "delete .venv and run again with Python 3.11, or install a matching torchvision into .venv by hand."
    )


def _imports(python: Path, statement: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {statement}"], capture_output=True).returncode == 0
