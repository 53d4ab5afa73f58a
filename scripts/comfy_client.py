"""Talks to a running ComfyUI through its HTTP and websocket API, as its own page does."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Prompt = dict[str, dict[str, Any]]
"""A graph in ComfyUI's API format: node id -> class_type and inputs."""
Event = dict[str, Any]
"""One websocket message: type and data."""


class ComfyError(RuntimeError):
    """The server refused or failed to run a graph. The message is the node's own."""


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
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


class ComfyClient:
    """A synchronous client of one server; `url` like http://127.0.0.1:8188."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        """Returns the JSON at a path of the server."""
        return json.loads(self._request(path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Posts JSON and returns the answer's bytes."""
        return self._request(path, json.dumps(body or {}).encode())

    def object_info(self) -> dict[str, Any]:
        """Returns the declaration of every node the server knows."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Stops the run in progress."""
        self.post("/interrupt")

    def free(self) -> None:
        """Unloads every model and forgets every cached result."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def image(self, reference: dict[str, str]) -> bytes:
        """Returns the file that an `images` output names."""
        return self._request("/view?" + urllib.parse.urlencode(reference))

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None = None,
        workflow: dict[str, Any] | None = None,
        targets: list[str] | None = None,
    ) -> Result:
        """Runs a graph to its end.

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
        return asyncio.run(self._run(body, on_event))

    async def _run(self, body: dict[str, Any], on_event: Callable[[Event], None] | None) -> Result:
        socket_url = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session:
            try:
                async with session.ws_connect(socket_url, max_msg_size=0) as socket:
                    watch = _Watch(Result(json.loads(self.post("/prompt", body))["prompt_id"]))
                    async for message in socket:
                        if message.type != aiohttp.WSMsgType.TEXT:
                            continue  # binary messages are preview pictures
                        event = json.loads(message.data)
                        if event.get("data", {}).get("prompt_id") != watch.result.prompt_id:
                            continue
                        if on_event is not None:
                            on_event(event)
                        if watch.see(event):
                            return self._with_outputs(watch.result)
            except aiohttp.ClientError as error:
                raise ComfyError(f"The connection to ComfyUI at {self.url} broke: {error}") from error
        raise ComfyError(f"ComfyUI at {self.url} closed the connection before the run was done.")

    def _with_outputs(self, result: Result) -> Result:
        result.outputs = self.get(f"/history/{result.prompt_id}")[result.prompt_id]["outputs"]
        return result

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, data=body)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise ComfyError(_refusal(error)) from error
        except OSError as error:
            raise ComfyError(f"ComfyUI at {self.url} does not answer: {error}") from error


class _Watch:
    """Follows the messages of one run."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.started = 0.0

    def see(self, event: Event) -> bool:
        """Takes one message in; returns True when the run is done.

        Raises:
            ComfyError: the message says that the run failed.
        """
        kind, data = event["type"], event["data"]
        if kind == "execution_error":
            raise ComfyError(f"{data['node_type']}: {data['exception_message'].strip()}")
        if kind == "execution_interrupted":
            raise ComfyInterrupted(f"The run was interrupted at {data['node_type']}.")
        if kind == "execution_start":
            self.started = data["timestamp"]
        if kind == "execution_success":
            self.result.seconds = (data["timestamp"] - self.started) / 1000.0
        # Only this last message says that the outputs are in the history.
        return kind == "executing" and data["node"] is None


def _refusal(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        body = json.loads(text)
        reasons = [
            f"{node['class_type']}: {reason['message']}: {reason['details']}"
            for node in body["node_errors"].values()
            for reason in node["errors"]
        ]
        return "; ".join(reasons) or body["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"ComfyUI answered {error.code} to {error.url}: {text[:300]}"
