"""Run is clicked, and what the nodes made is seen on the screen."""

from front_end import read

IMAGE = 64 * 64
"""Pixels of the tiny model's image; the canvas enlarges none."""
FEW_STEPS = """() => app.graph.nodes.forEach(node => (node.widgets ?? []).forEach(widget => {
    if (widget.name === "steps") widget.value = 6;
}))"""
"""A shipped workflow takes 25 steps; the images appear after 6 as well."""


def opened(front, pack, name):
    """Opens a shipped workflow; returns its node ids by node type."""
    nodes = read(pack, name)["nodes"]
    front.open_template(name, len(nodes))
    front.page.evaluate(FEW_STEPS)
    ids: dict[str, list[str]] = {}
    for node in nodes:
        ids.setdefault(node["type"], []).append(str(node["id"]))
    return ids


def run_and_see(front, nodes, pixels=None, seen=IMAGE // 2):
    """Clicks Run; returns the sizes of each node's images, once they are seen on its face."""
    pixels = pixels or front.bright_pixels
    before = {node: pixels(node) for node in nodes}
    outputs = front.run()
    assert set(nodes) <= outputs.keys()
    sizes = {node: front.images(node) for node in nodes}
    for node in nodes:
        assert pixels(node) - before[node] > seen
    assert front.overlaps() == []
    return sizes


def test_the_tiny_models_images_appear(front, bare_errors, pack):
    ids = opened(front, pack, "base_versus_aligned")
    with front.listening() as heard:
        run_and_see(front, ids["SaveImage"])
        front.keep_all("image")
    assert set(heard) - bare_errors == set()


def test_reward_badges_appear(front, bare_errors, pack):
    ids = opened(front, pack, "score_rewards")
    with front.listening() as heard:
        sizes = run_and_see(front, ids["HyperAlignRewardScore"])
        front.keep_all("badges")
    for images in sizes.values():
        assert all(height > width for width, height in images)  # the strip under each square image
    assert set(heard) - bare_errors == set()


def test_the_trace_image_appears(front, bare_errors, pack):
    ids = opened(front, pack, "trace")
    with front.listening() as heard:
        sizes = run_and_see(front, ids["HyperAlignTrace"], front.coloured_pixels)
        front.look(ids["HyperAlignTrace"][0]).save(front.path("trace"))
        front.keep_all("traced")
    assert all(width >= 512 for images in sizes.values() for width, _ in images)
    assert set(heard) - bare_errors == set()
