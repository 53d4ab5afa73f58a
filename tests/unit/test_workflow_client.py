"""The client's end of a connection: websocket frames as the standard writes them, and what servers answer."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.cli.sample.client import ComfyClient, ComfyError, _reasons
from hyperalign.cli.sample.websocket import CLOSE, PING, PONG, TEXT, WebSocket

ACCEPTED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
BINARY, CONTINUED = 2, 0


def frame(kind: int, payload: bytes, final: bool = True) -> bytes:
    """A frame as a server sends it (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        length = bytes([size])
    else:
        length = b"\x7e" + struct.pack("!H", size) if size < 65536 else b"\x7f" + struct.pack("!Q", size)
    return bytes([128 * final | kind]) + length + payload


@contextmanager
def serving(talk: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server for one connection, whose half of the talk runs in a thread; yields host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(4096)
                talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


@given(
    st.lists(st.text(max_size=40).map(lambda text: text * 2000), max_size=3),
    st.lists(st.integers(1, 5000), min_size=1, max_size=4),
)
@settings(max_examples=15, deadline=None)
def test_texts_arrive_whole_however_they_are_cut(texts: list[str], cuts: list[int]):
    sent = b"".join(frame(BINARY, b"preview") + frame(TEXT, text.encode()) for text in texts)

    def talk(connection: socket.socket) -> None:
        rest, turn = ACCEPTED + sent, 0
        while rest:
            connection.sendall(rest[: cuts[turn % len(cuts)]])
            rest, turn = rest[cuts[turn % len(cuts)] :], turn + 1

    with serving(talk) as place, WebSocket(f"ws://{place}/ws?clientId=1") as end:
        assert [end.receive(5.0) for _ in texts] == texts


def test_parts_are_joined_pings_answered_and_silence_is_none():
    pong: list[bytes] = []
    go_on = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(ACCEPTED + frame(TEXT, b"one ", final=False) + frame(PING, b"there?"))
        pong.append(connection.recv(64))
        go_on.wait(10)
        connection.sendall(frame(CONTINUED, b"two") + frame(CLOSE, b""))

    with serving(talk) as place, WebSocket(f"ws://{place}/ws?clientId=1") as end:
        assert end.receive(0.3) is None
        go_on.set()
        assert end.receive(5.0) == "one two"
        with pytest.raises(ConnectionError, match="closed the connection"):
            end.receive(5.0)
    kind, length, mask, masked = pong[0][0], pong[0][1], pong[0][2:6], pong[0][6:]
    assert (kind, length) == (128 | PONG, 128 | 6), "a client's frames are masked"
    assert bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked)) == b"there?"


def test_each_thing_that_is_wrong_is_said_once_and_whole():
    long = "There is no hypernetwork; " + "put it there. " * 60
    errors = [{"message": "Custom validation failed for node", "details": f"{x} - {long}"} for x in "abc"]
    other = {"message": "Value not in list", "details": "reward: 'x' not in [...]"}
    node_errors = {
        "3": {"class_type": "HyperAlignLoader", "errors": errors},
        "5": {"class_type": "HyperAlignRewardLoader", "errors": [other]},
    }
    first, second = _reasons(node_errors, {"3": {"_meta": {"title": "Mine"}}}).split("\n")
    assert first == f"'Mine' (HyperAlignLoader, #3): Custom validation failed for node: {long.strip()}"
    assert second == "HyperAlignRewardLoader: Value not in list: reward: 'x' not in [...]"


def test_what_speaks_no_websocket_is_refused():
    with serving(lambda connection: connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")) as place:
        with pytest.raises(ConnectionError, match="404"):
            WebSocket(f"ws://{place}/")
    with serving(lambda connection: connection.sendall(b"220 mail")) as place:
        with pytest.raises(ConnectionError, match="closed"):
            WebSocket(f"ws://{place}/")


def test_what_answers_but_is_no_comfyui_is_said_to_be_none():
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
    with serving(lambda connection: connection.sendall(page)) as place:
        with pytest.raises(ComfyError, match="is no ComfyUI"):
            ComfyClient(f"http://{place}").object_info()
    with pytest.raises(ComfyError, match="does not answer"):
        ComfyClient("http://127.0.0.1:9").object_info()
