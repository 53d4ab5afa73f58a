"""Builds the wheel of `hyperalign`, installs it in an environment of its own and imports every module.

`python3 scripts/check_wheel.py`, about half a minute. torch and what ComfyUI brings are those of `.venv`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from scripts.common import ROOT, ScriptError, run_pip, say
from scripts.environment import enter_environment, python_of

STAGED = ("hyperalign", "train", "nodes", "__init__.py", "LICENSE", "README.md", "pyproject.toml")
IMPORTS = """
import importlib.util, pathlib, pkgutil, sys
import hyperalign

places = [pathlib.Path(place) for place in hyperalign.__path__]
assert all(pathlib.Path(sys.prefix) in place.parents for place in places), f"imported from {places}"
leaked = [name for name in ("train", "nodes") if importlib.util.find_spec(name)]
assert not leaked, f"the wheel installs {leaked}"
skipped = ("hyperalign.hosts.comfy.", "hyperalign.__main__")
modules = pkgutil.walk_packages(hyperalign.__path__, "hyperalign.")
names = [module.name for module in modules if not module.name.startswith(skipped)]
for name in names:
    importlib.import_module(name)
print(f"{len(names)} modules were imported from the wheel.")
"""
"""All but the ComfyUI host, which needs ComfyUI."""


def main() -> None:
    """Builds, inspects, installs and imports the wheel.

    Raises:
        ScriptError: it lacks a file, holds another package, or does not import.
    """
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="hyperalign-wheel-") as scratch:
        folder = Path(scratch)
        _stage(folder / "source")
        run_pip(
            python,
            ["wheel", "--no-deps", str(folder / "source"), "--wheel-dir", scratch],
            "what builds the wheel",
        )
        wheel = next(folder.glob("*.whl"))
        _inspect(wheel, folder / "source")
        _import(wheel, folder)
    say(f"{wheel.name} holds hyperalign alone, and imports.")


def _stage(target: Path) -> None:
    """Copies what a build reads: setuptools would leave its own files in the repository."""
    target.mkdir()
    for name in STAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, target / name)


def _inspect(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    files = {
        path.relative_to(source).as_posix() for path in (source / "hyperalign").rglob("*") if path.is_file()
    }
    if missing := sorted(files - held):
        raise ScriptError(
            f"{wheel.name} lacks {', '.join(missing)}: add them to package-data in pyproject.toml."
        )
    if foreign := sorted(held - files):
        raise ScriptError(
            f"{wheel.name} also holds {', '.join(foreign)}: see packages.find in pyproject.toml."
        )


def _import(wheel: Path, folder: Path) -> None:
    """Imports in an environment that has the wheel, and finds torch where this interpreter does."""
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = python_of(environment)
    run_pip(Path(sys.executable), ["--python", str(python), "install", "--no-deps", str(wheel)], wheel.name)
    site = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # A path in a .pth file is searched last; .pth files found there, an editable hyperalign's, are not read.
    (Path(site) / "host.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    done = subprocess.run([str(python), "-I", "-c", IMPORTS], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise ScriptError(f"{wheel.name} cannot be imported on its own: {done.stderr.strip()}")
    say(done.stdout.strip())


if __name__ == "__main__":
    try:
        enter_environment(Path(__file__).resolve())
        main()
    except ScriptError as error:
        say(f"Error: {error}")
        sys.exit(1)
