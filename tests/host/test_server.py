"""The server as a user's ComfyUI: the pack is installed, loads, and its client tells errors apart."""

import pytest

from hyperalign.cli.sample.client import ComfyError


def test_the_server_answers(server):
    assert server.client.get("/system_stats")["system"]["comfyui_version"]


def test_the_pack_is_loaded(server):
    assert "HyperAlignApply" in server.client.object_info()
    failed = [line for line in server.server.log().splitlines() if "IMPORT FAILED" in line]
    assert not [line for line in failed if "custom_nodes" in line]


def test_a_refused_graph_says_why(server):
    graph = {"1": {"class_type": "EmptyImage", "inputs": {"width": -4}}}
    with pytest.raises(ComfyError, match="no outputs"):
        server.client.run(graph)


def test_a_refused_input_names_its_node(server):
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 0, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(ComfyError, match="EmptyImage: .*min"):
        server.client.run(graph)
