"""Talks to a running ComfyUI through its HTTP and websocket interface, as its own page does."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import HyperAlignError
from .files import ObjectInfo, Prompt, Workflow
from .websocket import WebSocket

ANSWER_SECONDS = 60
SILENT_SECONDS = 20.0
"""After so long without a message the history is asked whether the run has ended."""
LONGEST_REASON = 600

Event = dict[str, Any]
"""One websocket message: type and data."""


class ComfyError(HyperAlignError):
    """The server does not answer, or refused or failed to run a graph; then the message is the node's own."""


class ComfyInterrupted(ComfyError):
    """The run was interrupted."""


@dataclass
class Result:
    """What one run gave.

    Attributes:
        prompt_id: The server's name of the run.
        outputs: Per node id what the node showed: images, text.
        seconds: From start to end, by the server's clock.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    seconds: float = 0.0


class ComfyClient:
    """A synchronous client of one server; `url` like http://127.0.0.1:8188."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        """Returns the JSON at a path of the server. Raises ComfyError."""
        try:
            return json.loads(self._request(path))
        except json.JSONDecodeError as error:
            raise ComfyError(f"What answers at {self.url} is no ComfyUI; give the address of one.") from error

    def post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Posts JSON and returns the answer's bytes. Raises ComfyError."""
        return self._request(path, json.dumps(body or {}).encode())

    def object_info(self) -> ObjectInfo:
        """Returns the declaration of every node the server knows. Raises ComfyError."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Stops the run in progress."""
        self.post("/interrupt")

    def cancel(self, prompt_id: str) -> None:
        """Takes a run from the queue, or stops it where it is in progress."""
        self.post("/queue", {"delete": [prompt_id]})
        running = self.get("/queue").get("queue_running") or []
        if any(prompt_id in entry for entry in running):
            self.post("/interrupt", {"prompt_id": prompt_id})

    def free(self) -> None:
        """Unloads every model and forgets every cached result."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def image(self, reference: dict[str, str]) -> bytes:
        """Returns the file that an `images` output names."""
        return self._request("/view?" + urllib.parse.urlencode(reference))

    def upload(self, path: Path) -> str:
        """Puts an image into the server's input folder, as dropping it on a node does.

        Returns its name there. Raises ComfyError when it cannot be read or the server refuses it.
        """
        try:
            image = path.read_bytes()
        except OSError as error:
            raise ComfyError(f"{path} cannot be read ({error}); give another image.") from error
        mark = uuid.uuid4().hex
        name = path.name.replace('"', "_")
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + image + f"\r\n--{mark}--\r\n".encode()
        kind = f"multipart/form-data; boundary={mark}"
        answer = json.loads(self._request("/upload/image", body, kind=kind))
        return "/".join(filter(None, (answer.get("subfolder"), answer["name"])))

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None = None,
        workflow: Workflow | None = None,
        targets: list[str] | None = None,
    ) -> Result:
        """Runs a graph to its end; what interrupts the wait takes the run from the server too.

        Args:
            prompt: The graph in API format.
            on_event: Called with every message about this run; may call `interrupt`.
            workflow: The same graph in the page's format, embedded in saved images.
            targets: Ids of the output nodes to run; None runs all of them.

        Raises:
            ComfyError: a node refused its inputs or failed; the message is the node's own.
            ComfyInterrupted: the run was interrupted.
        """
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        if targets is not None:
            body["partial_execution_targets"] = targets
        socket_url = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.id}"
        try:
            with WebSocket(socket_url) as socket:
                answer = json.loads(self._request("/prompt", json.dumps(body).encode(), prompt))
                watch = _Watch(Result(answer["prompt_id"]), prompt)
                if answer.get("node_errors"):  # the server would run the rest of the graph
                    self.cancel(watch.result.prompt_id)
                    raise ComfyError(_reasons(answer["node_errors"], prompt))
                try:
                    self._follow(socket, watch, on_event)
                except (KeyboardInterrupt, SystemExit):
                    self.cancel(watch.result.prompt_id)
                    raise
        except OSError as error:
            raise ComfyError(f"The connection to ComfyUI at {self.url} broke: {error}") from error
        entry = self.get(f"/history/{watch.result.prompt_id}").get(watch.result.prompt_id) or {}
        watch.result.outputs = entry.get("outputs") or {}
        return watch.result

    def _follow(self, socket: WebSocket, watch: _Watch, on_event: Callable[[Event], None] | None) -> None:
        while True:
            text = socket.receive(SILENT_SECONDS)
            if text is None:
                if self._has_ended(watch):
                    return
                continue
            event = json.loads(text)
            if event.get("data", {}).get("prompt_id") != watch.result.prompt_id:
                continue
            if on_event is not None:
                on_event(event)
            if watch.see(event):
                return

    def _has_ended(self, watch: _Watch) -> bool:
        """Asks the history, in case the last message was lost. Raises ComfyError when the run failed."""
        entry = self.get(f"/history/{watch.result.prompt_id}").get(watch.result.prompt_id)
        for kind, data in (entry or {}).get("status", {}).get("messages", []):
            watch.see({"type": kind, "data": data})
        return entry is not None

    def _request(
        self,
        path: str,
        body: bytes | None = None,
        prompt: Prompt | None = None,
        kind: str = "application/json",
    ) -> bytes:
        request = urllib.request.Request(self.url + path, data=body)
        if body is not None:
            request.add_header("Content-Type", kind)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise ComfyError(_refusal(error, prompt or {})) from error
        except (OSError, ValueError) as error:
            raise ComfyError(f"ComfyUI at {self.url} does not answer: {error}") from error


class _Watch:
    """Follows the messages of one run."""

    def __init__(self, result: Result, prompt: Prompt) -> None:
        self.result = result
        self._prompt = prompt
        self._started = 0.0

    def see(self, event: Event) -> bool:
        """Takes one message in; returns True when the run is done.

        Raises:
            ComfyError: the message says that the run failed.
        """
        kind, data = event["type"], event["data"]
        if kind == "execution_error":
            where = node_name(self._prompt, str(data["node_id"]), data["node_type"])
            raise ComfyError(f"{where}: {_sentence(data['exception_message'])}")
        if kind == "execution_interrupted":
            where = node_name(self._prompt, str(data["node_id"]), data["node_type"])
            raise ComfyInterrupted(f"The run was interrupted at {where}.")
        if kind == "execution_start":
            self._started = data["timestamp"]
        if kind == "execution_success":
            self.result.seconds = (data["timestamp"] - self._started) / 1000.0
        # Only this last message says that the outputs are in the history.
        return kind == "executing" and data["node"] is None


def node_name(prompt: Prompt, node: str, kind: str) -> str:
    """Returns a node's type, after its title where it has one of its own."""
    title = prompt.get(node, {}).get("_meta", {}).get("title")
    return f"{title!r} ({kind}, #{node})" if title and title != kind else kind


def _sentence(text: str) -> str:
    """Returns a node's message on one line."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]} ..."


def _refusal(error: urllib.error.HTTPError, prompt: Prompt) -> str:
    text = error.read().decode(errors="replace")
    try:
        body = json.loads(text)
        return _reasons(body["node_errors"], prompt) or _sentence(body["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"ComfyUI answered {error.code} to {error.url}: {text[:300]}"


def _reasons(node_errors: dict[str, Any], prompt: Prompt) -> str:
    """Returns a line for each thing that is wrong with each node."""
    lines: dict[tuple[str, str], str] = {}
    for number, node in node_errors.items():
        for reason in node["errors"]:
            # What a node itself refuses, the server says again for each of its inputs, after `input - `.
            said = str(reason["details"]).partition(" - ")[2] or str(reason["details"])
            line = f"{node_name(prompt, number, node['class_type'])}: {reason['message']}: {said}"
            lines.setdefault((number, said), " ".join(line.split()))
    return "\n".join(lines.values())
