"""HyperAlign Strength Curve shows only the widgets that matter in its mode."""

import pytest

FOR_EASE = {"mode", "start_strength", "end_strength", "ease"}
FOR_LIST = {"mode", "values"}
ALWAYS = {"start_percent", "end_percent", "early_blocks", "middle_blocks", "late_blocks"}
EVERY = FOR_EASE | FOR_LIST | ALWAYS
SAVED = ["ease", 1, 0, "linear", "1, 1, 0.5, 0", 0, 1, 1, 1, 1]


@pytest.fixture
def curve(front):
    """A new curve, alone on the canvas; its id."""
    return front.add("HyperAlignStrength")


@pytest.fixture
def can_hide(front):
    """Whether this front end can show again what it hid; Vue's nodes in 1.32 cannot, and show everything."""
    return not (front.vue and front.version < (1, 33))


def test_each_mode_shows_its_own_widgets(front, curve, can_hide):
    heights = {}
    for mode, own in (("list", FOR_LIST), ("ease", FOR_EASE)):
        front.choose(curve, "mode", mode)
        expected = own | ALWAYS if can_hide else EVERY
        assert front.widgets_shown(curve, expected) == expected
        heights[mode] = front.look(curve).height
        front.look(curve).save(front.path(f"strength-{mode}"))
    assert heights["list"] < heights["ease"] or not can_hide


def test_hidden_widgets_are_saved_in_their_places(front, curve):
    assert front.widget_values()[curve] == SAVED
    front.choose(curve, "mode", "list")
    assert front.widget_values()[curve] == ["list", *SAVED[1:]]


def test_a_connected_list_hides_the_curve_of_the_node(front, curve, can_hide):
    connect = """() => {
        const source = LiteGraph.createNode("PrimitiveFloat"), [curve] = app.graph.nodes;
        app.graph.add(source);
        source.connect(0, curve, curve.findInputSlot("floats"));
    }"""
    front.page.evaluate(connect)
    front.settle()
    expected = ALWAYS if can_hide else EVERY
    assert front.widgets_shown(curve, expected) == expected
