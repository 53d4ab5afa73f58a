// Shows in HyperAlign Strength Curve only the widgets that matter. The node is the same without this file.
import { app } from "../../../scripts/app.js";

const WIDGETS_OF = { ease: ["start_strength", "end_strength", "ease"], list: ["values"] };
const CURVE_WIDGETS = ["mode", ...Object.values(WIDGETS_OF).flat()];

function isLinked(node, name) {
  return node.inputs.some((input) => input.name === name && input.link != null);
}

// A connected list takes the place of the mode and of all that belongs to it.
function isUsed(node, name, mode) {
  return !isLinked(node, "floats") && (name === "mode" || WIDGETS_OF[mode].includes(name));
}

// Vue's nodes of front end 1.32 copy their widgets once; what was hidden there could not be shown again.
function vueLooksAgain(node) {
  const property = Object.getOwnPropertyDescriptor(node, "widgets");
  return property?.get !== undefined && property.configurable;
}

function showWhatMatters(node) {
  const mode = node.widgets.find((widget) => widget.name === "mode").value;
  if (!(mode in WIDGETS_OF)) return;
  const drawnByVue = vueLooksAgain(node);
  for (const widget of node.widgets.filter(({ name }) => CURVE_WIDGETS.includes(name))) {
    widget.hidden = !isUsed(node, widget.name, mode) && !isLinked(node, widget.name);
    // The canvas of front end 1.32 keeps room for hidden widgets, and 4 pixels between any two.
    widget.computeSize = widget.hidden ? () => [0, -4] : undefined;
    if (drawnByVue) widget.options.hidden = widget.hidden;
  }
  if (drawnByVue) {
    const widgets = [...node.widgets];
    node.widgets = []; // the same ones again would not be noticed
    node.widgets = widgets;
  }
  app.canvas?.setDirty(true, true);
}

function after(object, name, then) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    requestAnimationFrame(then); // when the front end has done its own
    return result;
  };
}

app.registerExtension({
  name: "HyperAlign.StrengthCurve",
  nodeCreated(node) {
    if (node.comfyClass !== "HyperAlignStrength") return;
    const show = () => showWhatMatters(node);
    const showAndFit = () => {
      show();
      node.setSize([node.size[0], node.computeSize()[1]]);
    };
    after(node.widgets.find((widget) => widget.name === "mode"), "callback", showAndFit);
    after(node, "onConfigure", show);
    after(node, "onConnectionsChange", show);
    requestAnimationFrame(show);
  },
});
