"""The reading end of a websocket (RFC 6455), as far as a server's messages need it."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import struct
from contextlib import AbstractContextManager
from types import TracebackType
from urllib.parse import urlsplit

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
LARGEST_HEADER = 1 << 16


class WebSocket(AbstractContextManager["WebSocket"]):
    """Connects at once.

    Args:
        url: like ws://127.0.0.1:8188/ws?clientId=1, or wss.
        timeout: seconds for the connection to stand.

    Raises:
        OSError: nothing answers there, or something that speaks no websocket.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        place = urlsplit(url)
        host, secure = place.hostname or "", place.scheme == "wss"
        self._socket = socket.create_connection((host, place.port or (443 if secure else 80)), timeout)
        self._waiting = b""
        self._text = b""
        try:
            if secure:
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            self._shake_hands(place.netloc.rpartition("@")[2], f"{place.path}?{place.query}")
        except BaseException:
            self._socket.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def receive(self, timeout: float) -> str | None:
        """Returns the next text, or None when none came in time; other messages are passed over.

        Raises ConnectionError when the server closed the connection.
        """
        self._socket.settimeout(timeout)
        while True:
            try:
                final, kind, payload = self._frame()
            except TimeoutError:
                return None
            if kind == CLOSE:
                raise ConnectionError("the server closed the connection")
            if kind == PING:
                self._send(PONG, payload)
            elif kind in (TEXT, 0) and (kind == TEXT or self._text):
                self._text += payload
                if final:
                    text, self._text = self._text, b""
                    return text.decode("utf-8", errors="replace")

    def _shake_hands(self, host: str, path: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        lines = (
            f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(lines).encode())
        while b"\r\n\r\n" not in self._waiting:
            if len(self._waiting) > LARGEST_HEADER:
                raise ConnectionError("the server answered with no websocket")
            self._read_more()
        head, _, self._waiting = self._waiting.partition(b"\r\n\r\n")
        status = head.split(b"\r\n")[0].decode("latin-1")
        if " 101 " not in f"{status} ":
            raise ConnectionError(f"the server refused a websocket ({status})")

    def _frame(self) -> tuple[bool, int, bytes]:
        """Returns a whole frame: whether it is a message's last, its kind, its payload.

        What has come of a frame stays in `_waiting` over a time-out.
        """
        first, second = self._peek(2)
        start, length = 2, second & 127
        if length >= 126:
            start = 4 if length == 126 else 10
            length = struct.unpack("!H" if start == 4 else "!Q", self._peek(start)[2:])[0]
        frame = self._peek(start + length)
        self._waiting = self._waiting[start + length :]
        return bool(first & 128), first & 15, frame[start:]

    def _peek(self, length: int) -> bytes:
        while len(self._waiting) < length:
            self._read_more()
        return self._waiting[:length]

    def _read_more(self) -> None:
        found = self._socket.recv(1 << 16)
        if not found:
            raise ConnectionError("the server closed the connection")
        self._waiting += found

    def _send(self, kind: int, payload: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        self._socket.sendall(bytes([128 | kind, 128 | len(payload)]) + mask + masked)
