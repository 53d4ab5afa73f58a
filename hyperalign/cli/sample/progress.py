"""How far a run is: one changing line on a terminal, a line per node elsewhere."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType

from .client import Event
from .files import Prompt

WIDTH = 78


class Progress(AbstractContextManager["Progress"]):
    """Follows a run's messages. `prompt` is the graph that runs."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._begun: dict[str, None] = {}
        self._line = ""
        self._live = sys.stderr.isatty()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def see(self, event: Event) -> None:
        """Takes one message in."""
        kind, data = event["type"], event["data"]
        if kind == "execution_cached":
            self._begun |= dict.fromkeys(map(str, data["nodes"]))
        elif kind == "executing" and data["node"] is not None:
            self._node(str(data.get("display_node") or data["node"]))
        elif kind == "progress" and self._live:
            self._show(f"{self._line}  {data['value']}/{data['max']}")

    def _node(self, node: str) -> None:
        self._begun[node] = None
        title = self._prompt.get(node, {}).get("_meta", {}).get("title") or node
        done = min(len(self._begun), len(self._prompt))
        self._line = f"[{done}/{len(self._prompt)}] {title}"
        if self._live:
            self._show(self._line)
        else:
            sys.stderr.write(f"{self._line}\n")

    def _show(self, line: str) -> None:
        sys.stderr.write(f"\r{line[:WIDTH]:{WIDTH}s}")
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write(f"\r{'':{WIDTH}s}\r")
