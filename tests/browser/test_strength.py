"""HyperAlign Strength Curve shows only the widgets that matter in its mode."""

import pytest

FOR_EASE = {"mode", "start_strength", "end_strength", "ease"}
FOR_LIST = {"mode", "values"}
ALWAYS = {"start_percent", "end_percent", "early_blocks", "middle_blocks", "late_blocks"}
SAVED = ["ease", 1, 0, "linear", "1, 1, 0.5, 0", 0, 1, 1, 1, 1]


@pytest.fixture
def curve(front):
    """A new curve, alone on the canvas; its id."""
    return front.add("HyperAlignStrength")


def test_each_mode_shows_its_own_widgets(front, curve):
    heights = {}
    for mode, own in (("list", FOR_LIST), ("ease", FOR_EASE)):
        front.choose(curve, "mode", mode)
        assert front.widgets_shown(curve, own | ALWAYS) == own | ALWAYS
        heights[mode] = front.look(curve).height
        front.look(curve).save(front.path(f"strength-{mode}"))
    assert heights["list"] < heights["ease"]


def test_hidden_widgets_are_saved_in_their_places(front, curve):
    assert front.widget_values()[curve] == SAVED
    front.choose(curve, "mode", "list")
    assert front.widget_values()[curve] == ["list", *SAVED[1:]]


def test_a_connected_list_hides_the_curve_of_the_node(front, curve):
    connect = """() => {
        const source = LiteGraph.createNode("PrimitiveFloat"), [curve] = app.graph.nodes;
        app.graph.add(source);
        source.connect(0, curve, curve.findInputSlot("floats"));
    }"""
    front.page.evaluate(connect)
    front.settle()
    assert front.widgets_shown(curve, ALWAYS) == ALWAYS
