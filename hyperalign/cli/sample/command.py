"""Runs a workflow on a local ComfyUI and saves its images.

python -m hyperalign sample --workflow heart.json --set "prompt=a red heart" --set seed=5
python -m hyperalign sample --workflow heart.json --comfyui ~/ComfyUI --out images -- --cpu

--set NAME=VALUE gives a widget another value. NAME is its name, where one node alone has it; title.name or
#id.name where several do; *.name for all of them. prompt and negative find the text by themselves,
seed=random samples a seed, and image=photo.png uploads an image. Without --set the workflow runs as saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HyperAlignError
from ...files import cannot_write, check_writable, write_bytes
from .convert import Graph, read
from .files import load
from .server import ComfyServer, answers, own_python
from .settings import changes_of, describe

if TYPE_CHECKING:
    from .client import ComfyClient, Result

USUAL_URL = "http://127.0.0.1:8188"
STOPPED = 130
"""The exit status after Ctrl+C."""
OTHER_OUT = "Give another --out."


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    workflow: Path
    settings: list[str]
    url: str | None
    comfyui: Path | None
    out: Path
    comfyui_arguments: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        for path in run(parse(arguments)):
            sys.stdout.write(f"{path}\n")
    except HyperAlignError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nStopped; the server no longer runs the workflow.")
        return STOPPED
    return 0


def run(options: Options) -> list[Path]:
    """Runs the workflow and returns the files it saved. Raises HyperAlignError."""
    try:  # both packages come with ComfyUI
        from .client import ComfyClient
        from .progress import Progress
    except ModuleNotFoundError as error:
        raise HyperAlignError(
            f"The package {error.name} is not installed; sample needs aiohttp and tqdm: run "
            f"`{sys.executable} -m pip install aiohttp tqdm`."
        ) from error
    content = load(options.workflow)
    check_writable(options.out / "image.png", OTHER_OUT)
    with _server(options) as url:
        client = ComfyClient(url)
        info = client.object_info()
        graph = read(content, info)
        for note in graph.notes:
            say(note)
        changes: dict[tuple[str, str], Any] = {}
        for setting in options.settings:
            found = changes_of(graph, info, setting, client.upload)
            say(describe(graph, found))
            if twice := changes.keys() & found.keys():
                node, name = next(iter(twice))
                raise HyperAlignError(f"{setting!r} sets {name} of node #{node} once more; give it once.")
            changes |= found
            graph = graph.with_values(found)
        with Progress(graph.prompt) as progress:
            result = client.run(graph.prompt, progress.see, graph.workflow)
        _show_texts(graph, result)
        return save(client, result, options.out)


def save(client: ComfyClient, result: Result, folder: Path) -> list[Path]:
    """Saves the files that a run saved on the server, or its previews if there are none. Overwrites nothing.

    Raises HyperAlignError when there is neither, or the disk refuses.
    """
    files = [
        item
        for output in result.outputs.values()
        for items in output.values()
        if isinstance(items, list)
        for item in items
        if isinstance(item, dict) and "filename" in item
    ]
    kept = [item for item in files if item.get("type") == "output"] or files
    if not kept:
        raise HyperAlignError("The workflow saved no image; end it with Save Image or Preview Image.")
    saved: list[Path] = []
    for item in kept:
        reference = {key: str(item.get(key, "")) for key in ("filename", "subfolder", "type")}
        path = _free(folder / Path(reference["filename"]).name)
        with cannot_write(path, OTHER_OUT):
            write_bytes(path, client.image(reference))
        saved.append(path)
    return saved


def _free(path: Path) -> Path:
    """Returns the path, with a number where a file has it already."""
    number, free = 2, path
    while free.exists():
        free = path.with_stem(f"{path.stem.rstrip('_')}_{number}")
        number += 1
    return free


def _show_texts(graph: Graph, result: Result) -> None:
    """Prints the texts that nodes show, as scores."""
    for node, output in result.outputs.items():
        for text in output.get("text") or []:
            say(f"{graph.titles.get(node, (node,))[-1]}: {text}")


@contextmanager
def _server(options: Options) -> Iterator[str]:
    """Yields the address of a ComfyUI: that of --url, a running one, or one started for this run."""
    tree = options.comfyui
    if options.url is None and tree is None:
        if answers(USUAL_URL):
            yield USUAL_URL
            return
        named = os.environ.get("COMFYUI_PATH")
        tree = Path(named).expanduser() if named else None
    if tree is None:
        url = options.url or USUAL_URL
        if not answers(url):
            raise HyperAlignError(
                f"No ComfyUI answers at {url}. Start one, give its address with --url, or the folder of a "
                "ComfyUI with --comfyui or in COMFYUI_PATH to have it started."
            )
        yield url
        return
    say(f"Starting ComfyUI from {tree} ...")
    with tempfile.TemporaryDirectory(prefix="hyperalign-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        arguments = ("--output-directory", scratch, "--temp-directory", scratch, *options.comfyui_arguments)
        with ComfyServer(
            tree, folder / "comfyui.log", folder / "comfyui.db", arguments, python=own_python(tree),
            advice="Where there is no GPU, end the command with `-- --cpu`.",
        ) as server:  # fmt: skip
            yield server.url


def say(text: str) -> None:
    """Writes a message to standard error. Standard output is for the paths of images, which scripts read."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def parse(arguments: Sequence[str] | None) -> Options:
    """Returns the options of the command line; a wrong one ends the process."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperalign sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workflow", type=Path, required=True, metavar="FILE", help="a .json as ComfyUI saves or exports it")
    add("--set", action="append", default=[], dest="settings", metavar="NAME=VALUE",
        help="another value for a widget; give it again for more")  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help=f"of a running ComfyUI (default: {USUAL_URL})")
    where.add_argument("--comfyui", type=Path, metavar="PATH",
        help="folder of a ComfyUI to start; COMFYUI_PATH where none runs")  # fmt: skip
    add("--out", type=Path, default=Path(), metavar="DIR", help="where images go (default: here)")
    add("comfyui_arguments", nargs="*", metavar="-- ARGUMENT", help="for a ComfyUI that is started, as --cpu")
    found = parser.parse_args(arguments)
    found.comfyui_arguments = tuple(found.comfyui_arguments)
    return Options(**vars(found))
