"""The progress of a run: a bar over the current node's steps in a terminal, a line per node elsewhere."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType

from tqdm import tqdm

from .files import Event, Prompt


class Progress(AbstractContextManager["Progress"]):
    """Follows a run's messages. `prompt` is the graph that runs."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._begun: set[str] = set()
        self._bar = tqdm(total=1, leave=False, disable=None)  # None: disabled where there is no terminal

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def see(self, event: Event) -> None:
        """Takes in one message."""
        kind, data = event["type"], event["data"]
        if kind == "execution_cached":
            self._begun.update(map(str, data["nodes"]))
        elif kind == "executing" and data["node"] is not None:
            self._node(str(data.get("display_node") or data["node"]))
        elif kind == "progress":
            self._bar.total = data["max"]
            self._bar.update(data["value"] - self._bar.n)

    def _node(self, node: str) -> None:
        self._begun.add(node)
        title = self._prompt.get(node, {}).get("_meta", {}).get("title") or node
        line = f"[{min(len(self._begun), len(self._prompt))}/{len(self._prompt)}] {title}"
        if self._bar.disable:
            sys.stderr.write(f"{line}\n")
        else:
            self._bar.set_description_str(line, refresh=False)
            self._bar.reset(total=1)
