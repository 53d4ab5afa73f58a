"""Workflows of the page, and the declarations of their nodes."""

from __future__ import annotations

from typing import Any

TEXT = ["STRING", {"multiline": True}]
INFO: dict[str, Any] = {
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True, "min": 0, "max": 2**64 - 1}],
                "steps": ["INT", {"default": 20}],
                "name": [["euler", "heun"], {}],
                "variant": ["COMBO", {"options": ["auto", "S"]}],
                "wired": ["FLOAT", {"forceInput": True}],
            },
            "optional": {"denoise": ["FLOAT", {}]},
        },
        "output": ["LATENT"],
    },
    "Loader": {"input": {"required": {"file": [["a", "b"]]}}, "output": ["MODEL"]},
    "Tuner": {"input": {"required": {"model": ["MODEL"], "amount": ["FLOAT", {}]}}, "output": ["MODEL"]},
    "Save": {
        "input": {"required": {"images": ["LATENT"], "prefix": ["STRING", {}]}},
        "output": [],
        "output_node": True,
    },
    "Number": {"input": {"required": {"value": ["INT", {}]}}, "output": ["INT"]},
    "Image": {
        "input": {"required": {"image": [["x.png"], {"image_upload": True}], "size": ["INT", {}]}},
        "output": ["IMAGE"],
    },
    "Chooser": {
        "input": {
            "required": {
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "plain", "inputs": {"required": {}}},
                            {
                                "key": "ramp",
                                "inputs": {"required": {"start": ["FLOAT", {}], "end": ["FLOAT", {}]}},
                            },
                        ]
                    },
                ],
                "after": ["INT", {}],
            }
        },
        "output": ["FLOAT"],
    },
    "Painter": {"input": {"required": {"colour": ["COLOURS", {}], "curve": ["CURVE", {}]}}, "output": []},
}


def socket(name: str, kind: str, link: int | None = None, widget: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link} | ({"widget": {"name": name}} if widget else {})


def node(number: int, kind: str, values: Any = (), inputs: Any = (), **more: Any) -> dict[str, Any]:
    outputs = [{"type": out} for out in INFO.get(kind, {}).get("output", [])]
    values = list(values) if isinstance(values, tuple) else values
    return {
        "id": number, "type": kind, "widgets_values": values, "inputs": list(inputs), "outputs": outputs,
    } | more  # fmt: skip


def sampler(number: int = 7, link: int | None = 1, **more: Any) -> dict[str, Any]:
    return node(
        number,
        "Sampler",
        (5, "fixed", 25, "heun", "auto", 0.5),
        [socket("model", "MODEL", link), socket("wired", "FLOAT"), *more.pop("sockets", [])],
        **more,
    )


def workflow(nodes: list[dict[str, Any]], *links: list[Any], **more: Any) -> dict[str, Any]:
    return {"nodes": nodes, "links": list(links)} | more


SIMPLE = workflow(
    [node(4, "Loader", ("a",)), sampler(), node(9, "MarkdownNote", ("read me",))],
    [1, 4, 0, 7, 0, "MODEL"],
)


def subgraph(name: str = "sub", **more: Any) -> dict[str, Any]:
    """A subgraph with a tuner and a sampler: model and steps go in, a latent comes out."""
    inner = [
        node(1, "Tuner", (0.5,), [socket("model", "MODEL", 1)]),
        sampler(2, link=2, sockets=[socket("steps", "INT", 4, widget=True)], title="Inner"),
    ]
    links = [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0, "type": "MODEL"},
        {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"},
        {"id": 3, "origin_id": 2, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
        {"id": 4, "origin_id": -10, "origin_slot": 1, "target_id": 2, "target_slot": 2, "type": "INT"},
    ]
    sockets = {"inputs": [{"name": "model"}, {"name": "steps"}], "outputs": [{"name": "LATENT"}]}
    return {"id": name, "name": "Aligned", "nodes": inner, "links": links} | sockets | more


def instance(number: int, values: Any = (12,), link: int | None = 1, **more: Any) -> dict[str, Any]:
    sockets = [socket("model", "MODEL", link), socket("steps", "INT", widget=True)]
    return node(number, "sub", values, sockets, outputs=[{"type": "LATENT"}]) | more


def around(*instances: dict[str, Any], **more: Any) -> dict[str, Any]:
    nodes = [
        node(4, "Loader", ("a",)),
        *instances,
        node(9, "Save", ("out",), [socket("images", "LATENT", 2)]),
    ]
    links = [[1, 4, 0, instances[0]["id"], 0, "MODEL"], [2, instances[0]["id"], 0, 9, 0, "LATENT"]]
    return workflow(nodes, *links, definitions={"subgraphs": [subgraph(**more)]})
