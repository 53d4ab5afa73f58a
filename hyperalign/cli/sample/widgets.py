"""Which inputs of a node are widgets, and where the page stores their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
SEEDS = ("seed", "noise_seed")
UPLOADS = ("image_upload", "animated_image_upload", "video_upload")

Inputs = Mapping[str, Any]
"""A declaration's `input`: the groups `required` and `optional`."""


@dataclass(frozen=True, slots=True)
class Widget:
    """An input that a node shows as a widget."""

    name: str
    kind: str
    """INT, FLOAT, STRING, BOOLEAN, COMBO, or a pack's own."""
    options: Mapping[str, Any]

    @property
    def has_control(self) -> bool:
        """Whether the page stores a `control_after_generate` beside the value."""
        default = self.kind == "INT" and self.name.rsplit(".", 1)[-1] in SEEDS
        return bool(self.options.get("control_after_generate", default))

    @property
    def choices(self) -> list[Any] | None:
        """The choices of a COMBO; None where any value is allowed, or only the page knows them."""
        found = self.options.get("options")
        if self.kind == DYNAMIC_COMBO:
            return [option["key"] for option in found or []]
        return list(found) if self.kind == "COMBO" and isinstance(found, list) else None

    @property
    def default(self) -> Any:
        """The value of a new widget; None where only the page knows it."""
        return self.options.get("default", next(iter(self.choices or []), None))

    @property
    def takes_files(self) -> bool:
        """Whether the page can upload a file here."""
        return any(self.options.get(upload) for upload in UPLOADS)

    @property
    def is_text(self) -> bool:
        """Whether this is a widget for prompts."""
        return self.kind == "STRING" and bool(
            self.options.get("multiline") or self.name in ("text", "prompt")
        )


def widgets(declaration: Mapping[str, Any], values: Mapping[str, Any]) -> list[Widget]:
    """Returns a node's widgets in the order of the page.

    Args:
        declaration: the server's declaration of the node.
        values: the node's inputs by name; they decide which widgets a dynamic choice shows.
    """
    return [widget for widget, _ in _in_order(declaration["input"], values.get, frozenset())]


def places(node: Mapping[str, Any], declaration: Mapping[str, Any]) -> dict[str, tuple[Widget, int | str]]:
    """Returns by name each widget of a saved node, with its key in the node's `widgets_values`."""
    saved = frozenset(socket["widget"]["name"] for socket in node.get("inputs") or [] if socket.get("widget"))
    values = node.get("widgets_values") or []
    if isinstance(values, dict):  # some packs save names
        walk = _in_order(declaration["input"], values.get, saved)
        return {widget.name: (widget, widget.name) for widget, _ in walk if widget.name in values}
    at: dict[str, int] = {}

    def value_of(name: str) -> Any:
        return values[at[name]] if at[name] < len(values) else None

    found: dict[str, tuple[Widget, int | str]] = {}
    for widget, position in _in_order(declaration["input"], value_of, saved, at):
        if position < len(values):
            found[widget.name] = widget, position
    return found


def _in_order(
    inputs: Inputs, value_of: Any, saved: frozenset[str], at: dict[str, int] | None = None, prefix: str = ""
) -> Iterator[tuple[Widget, int]]:
    """Yields widgets and their positions; `at` holds the positions so far."""
    at = {} if at is None else at
    for group in ("required", "optional"):
        uploads = 0
        for name, specification in inputs.get(group, {}).items():
            widget = _widget(prefix + name, specification)
            uploads += widget.takes_files
            if not _is_shown(widget, saved):
                continue
            yield widget, _take(at, widget.name)
            if widget.kind == DYNAMIC_COMBO:
                chosen = value_of(widget.name)
                shown = next((o["inputs"] for o in widget.options["options"] if o["key"] == chosen), {})
                yield from _in_order(shown, value_of, saved, at, f"{widget.name}.")
            if widget.has_control:
                _take(at, f"{widget.name} control")
                if widget.kind == "COMBO":
                    _take(at, f"{widget.name} filter")
        for number in range(uploads):  # the page puts its upload buttons behind the group
            _take(at, f"{prefix}{group} upload {number}")


def _take(at: dict[str, int], name: str) -> int:
    return at.setdefault(name, len(at))


def _is_shown(widget: Widget, saved: frozenset[str]) -> bool:
    known = widget.kind in (*KINDS, DYNAMIC_COMBO) or widget.name in saved
    return known and not widget.options.get("forceInput")


def _widget(name: str, specification: list[Any]) -> Widget:
    kind, options = specification[0], specification[1] if len(specification) > 1 else {}
    if isinstance(kind, list):
        return Widget(name, "COMBO", {**options, "options": kind})
    return Widget(name, str(kind), options)
