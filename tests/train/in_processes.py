"""Work done in processes of its own, as a launcher starts them, without each importing PyTorch anew."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PRELOADED = ["train.train", "train.encode", "train.generate"]
"""What the server imports from which all processes split off."""


class Ended(NamedTuple):
    """A process that has ended: its exit status, or minus the signal, and what it wrote."""

    status: int
    output: str
    errors: str


def in_processes(
    count: int, folder: Path, work: Callable[..., Any], *given: Any, timeout: float = 300.0
) -> list[Ended]:
    """Calls a function of an importable module in so many processes at once; what it returns is their status.

    More than one find each other as those of `accelerate launch` do. Each writes into files of the folder.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"process-{port}-{rank}" for rank in range(count)]
    processes = [
        context.Process(target=_begin, args=(rank, count, port, file, work, given))
        for rank, file in enumerate(files)
    ]
    try:
        for process in processes:
            process.start()
        return [_end(process, file, timeout) for process, file in zip(processes, files, strict=True)]
    finally:
        for process in processes:
            process.kill()


def script(path: str, *arguments: str) -> None:
    """Is the work of `python path arguments`."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _begin(
    rank: int, count: int, port: int, file: Path, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(file.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.chdir(ROOT)
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    os.environ |= {name: str(value) for name, value in launched.items()} if count > 1 else {}
    import torch

    torch.set_num_threads(1)
    sys.exit(work(*given))


def _end(process: ForkServerProcess, file: Path, timeout: float) -> Ended:
    process.join(timeout)
    output, errors = (file.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err"))
    if process.exitcode is None:
        raise TimeoutError(f"a process has not ended after {timeout:.0f} s: {errors[-2000:]}")
    return Ended(process.exitcode, output, errors)
