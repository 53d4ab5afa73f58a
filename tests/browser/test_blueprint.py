"""The blueprint "Aligned KSampler": found by the page's search, added to a graph, and run."""

import json

from scripts.common import ROOT

NAME = "Aligned KSampler"
ALIGNED = "11"
"""The workflow's second Save Image."""
WIDGETS = "hypernetwork strength variant seed steps cfg sampler_name scheduler denoise"
# Some front ends put the inner node's id before a widget's name.
NAMES = (
    "() => app.graph.nodes.find(node => node.subgraph).widgets.map(widget => widget.name.split(': ').pop())"
)
# Puts the blueprint, which the search left on the canvas, in the place of the workflow's sampler.
TAKE_THE_PLACE_OF_THE_SAMPLER = """() => {
    const byType = type => app.graph.nodes.find(node => node.type === type);
    const old = byType("HyperAlignSampler"), fresh = app.graph.nodes.find(node => node.subgraph);
    for (const name of ["model", "positive", "negative", "latent_image"]) {
        const link = app.graph.links.get(old.inputs.find(each => each.name === name).link);
        app.graph.getNodeById(link.origin_id).connect(link.origin_slot, fresh, fresh.findInputSlot(name));
    }
    const link = app.graph.links.get(old.outputs[0].links[0]);
    fresh.connect(0, app.graph.getNodeById(link.target_id), link.target_slot);
    app.graph.remove(old);
    fresh.widgets.find(widget => widget.name.endsWith("steps")).value = 4;
}"""


def test_the_blueprint_is_found_added_and_run(front, bare_errors):
    workflow = json.loads(
        (ROOT / "example_workflows" / "base_versus_aligned.json").read_text(encoding="utf-8")
    )
    with front.listening() as heard:
        front.load(workflow)
        front.page.evaluate("() => { app.canvas.ds.offset = [-5000, -5000]; }")
        front.settle()
        front.page.mouse.dblclick(800, 600)
        front.page.wait_for_function("() => document.activeElement?.tagName === 'INPUT'")
        front.page.keyboard.type(NAME)
        front.page.get_by_text(NAME, exact=False).first.wait_for()
        front.page.wait_for_timeout(500)  # the search waits for the last letter
        front.page.keyboard.press("Enter")
        front.page.wait_for_function("() => app.graph.nodes.some(node => node.subgraph)")
        shown = [name for name in front.page.evaluate(NAMES) if name != "control_after_generate"]
        assert shown == WIDGETS.split()  # newer front ends show the control in another way
        front.keep("blueprint")
        front.page.evaluate(TAKE_THE_PLACE_OF_THE_SAMPLER)
        outputs = front.run()
        assert ALIGNED in outputs
    assert set(heard) - bare_errors == set()
