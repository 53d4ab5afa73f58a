"""A client of ComfyUI's HTTP and websocket interface."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from ...errors import HyperAlignError
from ...files import first_line
from .files import Event, ObjectInfo, Prompt, Workflow

ANSWER_SECONDS = 60
SILENT_SECONDS = 20.0
"""After so long without a message the client asks the history whether the run has ended."""
LONGEST_REASON = 600


class ComfyError(HyperAlignError):
    """The server does not answer, or it refused a graph, or a node failed; then the message is the node's."""


class ComfyInterrupted(ComfyError):
    """The run was interrupted."""


@dataclass
class Result:
    """The result of one run.

    Attributes:
        prompt_id: The server's name of the run.
        outputs: Per node id what the node showed: images, text.
        seconds: From start to end, by the server's clock.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    seconds: float = 0.0


class ComfyClient:
    """A synchronous client of one server. No event loop may run in the calling thread.

    Args:
        url: The server's address, as http://127.0.0.1:8188.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        """Returns the JSON at a path of the server. Raises ComfyError."""
        try:
            return json.loads(self._request("GET", path))
        except json.JSONDecodeError as error:
            raise ComfyError(f"{self.url} answers, but it is no ComfyUI; give the address of one.") from error

    def post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Posts JSON and returns the answer's bytes. Raises ComfyError."""
        return self._request("POST", path, json=body or {})

    def object_info(self) -> ObjectInfo:
        """Returns the declarations of all nodes that the server has. Raises ComfyError."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Stops the current run."""
        self.post("/interrupt")

    def cancel(self, prompt_id: str) -> None:
        """Removes a run from the queue, or stops it if it is the current one."""
        self.post("/queue", {"delete": [prompt_id]})
        running = self.get("/queue").get("queue_running") or []
        if any(prompt_id in entry for entry in running):
            self.post("/interrupt", {"prompt_id": prompt_id})

    def free(self) -> None:
        """Unloads all models and clears the cache of results."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def image(self, reference: dict[str, str]) -> bytes:
        """Returns the file that an `images` output names."""
        return self._request("GET", "/view", params=reference)

    def upload(self, path: Path) -> str:
        """Uploads an image into the server's input folder and returns its name there.

        Raises ComfyError when it cannot be read or the server refuses it.
        """
        try:
            image = path.read_bytes()
        except OSError as error:
            raise ComfyError(f"{path} cannot be read ({error}); give another image.") from error
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", image, filename=path.name)
        answer = json.loads(self._request("POST", "/upload/image", data=form))
        return "/".join(filter(None, (answer.get("subfolder"), answer["name"])))

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] | None = None,
        workflow: Workflow | None = None,
        targets: list[str] | None = None,
    ) -> Result:
        """Runs a graph to its end. An exception that ends the wait, as Ctrl+C, cancels the run.

        Args:
            prompt: The graph in API format.
            on_event: Called with every message about this run; may call `interrupt`.
            workflow: The same graph in the page's format, embedded in saved images.
            targets: Ids of the output nodes to run; None runs all of them.

        Raises:
            ComfyError: a node refused its inputs or failed; the message is the node's own.
            ComfyInterrupted: the run was interrupted.
        """
        result = Result(str(uuid.uuid4()))  # known before the answer, so that Ctrl+C can cancel at any time
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.id, "prompt_id": result.prompt_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        if targets is not None:
            body["partial_execution_targets"] = targets
        try:
            with _Messages(f"{self.url}/ws?clientId={self.id}") as messages:
                try:
                    answer = json.loads(self._request("POST", "/prompt", prompt, json=body))
                    result.prompt_id = answer["prompt_id"]
                    if answer.get("node_errors"):  # the server would run the rest of the graph
                        self.cancel(result.prompt_id)
                        raise ComfyError(_reasons(answer["node_errors"], prompt))
                    self._follow(messages, _Watch(result, prompt), on_event)
                except (KeyboardInterrupt, SystemExit):
                    self.cancel(result.prompt_id)
                    raise
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ComfyError(f"The connection to ComfyUI at {self.url} broke: {first_line(error)}") from error
        result.outputs = self._history(result).get("outputs") or {}
        return result

    def _follow(self, messages: _Messages, watch: _Watch, on_event: Callable[[Event], None] | None) -> None:
        while True:
            event = messages.next(SILENT_SECONDS)
            if event is None:
                if self._has_ended(watch):
                    return
                continue
            if event.get("data", {}).get("prompt_id") != watch.result.prompt_id:
                continue
            if on_event is not None:
                on_event(event)
            if watch.see(event):
                return

    def _history(self, result: Result) -> dict[str, Any]:
        """Returns the server's record of a run, nothing before its end."""
        return self.get(f"/history/{result.prompt_id}").get(result.prompt_id) or {}

    def _has_ended(self, watch: _Watch) -> bool:
        """Asks the history, in case the last message was lost. Raises ComfyError when the run failed."""
        entry = self._history(watch.result)
        for kind, data in entry.get("status", {}).get("messages", []):
            watch.see({"type": kind, "data": data})
        return bool(entry)

    def _request(self, method: str, path: str, prompt: Prompt | None = None, **options: Any) -> bytes:
        """Returns the body of an answer. `prompt` gives the titles for the errors of nodes."""
        try:
            status, body = asyncio.run(_answer(method, self.url + path, **options))
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise ComfyError(f"ComfyUI at {self.url} does not answer: {first_line(error)}") from error
        if status >= 400:
            text = body[:300].decode(errors="replace")
            raise ComfyError(
                _refusal(body, prompt or {}) or f"ComfyUI answered {status} to {self.url}{path}: {text}"
            )
        return body


async def _answer(method: str, url: str, **options: Any) -> tuple[int, bytes]:
    timeout = aiohttp.ClientTimeout(sock_connect=ANSWER_SECONDS, sock_read=ANSWER_SECONDS)
    async with aiohttp.request(method, url, timeout=timeout, **options) as response:
        return response.status, await response.read()


class _Messages(AbstractContextManager["_Messages"]):
    """The server's websocket. It reads only inside `next`, so the caller may use the client in between."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        try:
            self._socket = self._loop.run_until_complete(self._connect(url))
        except BaseException:
            self.close()
            raise

    async def _connect(self, url: str) -> aiohttp.ClientWebSocketResponse[bool]:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)  # of the handshake
        self._session = aiohttp.ClientSession(timeout=timeout)
        return await self._session.ws_connect(url, max_msg_size=0)

    def next(self, timeout: float) -> Event | None:
        """Returns the next message, or None if there was none in time. Skips previews of images.

        Raises ConnectionError when the server closed the connection.
        """
        while True:
            try:
                message = self._loop.run_until_complete(self._socket.receive(timeout))
            except asyncio.TimeoutError:
                return None
            if message.type is aiohttp.WSMsgType.TEXT:
                return json.loads(message.data)
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise ConnectionError("the server closed the connection")

    def close(self) -> None:
        """Closes the connection, also after an interrupted `next`."""
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        interrupted = asyncio.all_tasks() - {asyncio.current_task()}
        for task in interrupted:
            task.cancel()
        await asyncio.gather(*interrupted, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Watch:
    """Follows the messages of one run."""

    def __init__(self, result: Result, prompt: Prompt) -> None:
        self.result = result
        self._prompt = prompt
        self._started = 0.0

    def see(self, event: Event) -> bool:
        """Takes in one message; returns True when the run is done.

        Raises:
            ComfyError: the message reports that the run failed.
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
        # The outputs are in the history only after this last message.
        return kind == "executing" and data["node"] is None


def node_name(prompt: Prompt, node: str, kind: str) -> str:
    """Returns a node's type, after its title where it has one of its own."""
    title = prompt.get(node, {}).get("_meta", {}).get("title")
    return f"{title!r} ({kind}, #{node})" if title and title != kind else kind


def _sentence(text: str) -> str:
    """Returns a node's message on one line."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]} ..."


def _refusal(body: bytes, prompt: Prompt) -> str:
    """Returns the reasons in a refusal of the server, nothing where it holds none."""
    try:
        content = json.loads(body)
        return _reasons(content["node_errors"], prompt) or _sentence(content["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _reasons(node_errors: dict[str, Any], prompt: Prompt) -> str:
    """Returns a line for each error of each node."""
    lines: dict[tuple[str, str], str] = {}
    for number, node in node_errors.items():
        for reason in node["errors"]:
            # The server repeats a node's own error for each of its inputs, after `input - `.
            details = str(reason["details"]).partition(" - ")[2] or str(reason["details"])
            line = f"{node_name(prompt, number, node['class_type'])}: {reason['message']}: {details}"
            lines.setdefault((number, details), " ".join(line.split()))
    return "\n".join(lines.values())
