// HyperAlign Strength Curve shows only the widgets of the selected mode. The node also works without this file.
import { app } from "../../../scripts/app.js";

const WIDGETS_OF = { ease: ["start_strength", "end_strength", "ease"], list: ["values"] };
const CURVE_WIDGETS = ["mode", ...Object.values(WIDGETS_OF).flat()];

function isLinked(node, name) {
  return node.inputs.some((input) => input.name === name && input.link != null);
}

// A connected list replaces the mode and its widgets.
function isUsed(node, name, mode) {
  return !isLinked(node, "floats") && (name === "mode" || WIDGETS_OF[mode].includes(name));
}

// Vue nodes before front end 1.36 copy their widgets once and do not notice changes.
function vueUpdatesWidgets() {
  const [major, minor] = (window.__COMFYUI_FRONTEND_VERSION__ ?? "1.36").split(".").map(Number);
  return major > 1 || minor >= 36;
}

// In those versions, each widget is a row that is hidden by a CSS rule.
function hideRows(node) {
  const rule = ({ index }) => `[data-node-id="${node.id}"] .lg-node-widget:nth-child(${index + 1})`;
  const hidden = node.widgets.map(({ hidden }, index) => ({ hidden, index })).filter(({ hidden }) => hidden);
  node.hyperalignRows ??= document.head.appendChild(document.createElement("style"));
  node.hyperalignRows.textContent = hidden.map((row) => `${rule(row)} { display: none; }`).join("\n");
}

function hideInVue(node) {
  if (!vueUpdatesWidgets()) return hideRows(node);
  for (const widget of node.widgets) widget.options.hidden = widget.hidden;
  if (!Object.getOwnPropertyDescriptor(node, "widgets")?.get) return; // node on the canvas
  const widgets = [...node.widgets];
  node.widgets = []; // the same array would not be noticed
  node.widgets = widgets;
}

function showUsedWidgets(node) {
  const mode = node.widgets.find((widget) => widget.name === "mode").value;
  if (!(mode in WIDGETS_OF)) return;
  for (const widget of node.widgets.filter(({ name }) => CURVE_WIDGETS.includes(name))) {
    widget.hidden = !isUsed(node, widget.name, mode) && !isLinked(node, widget.name);
    // The canvas of front end 1.32 reserves space for hidden widgets, and 4 pixels between any two widgets.
    widget.computeSize = widget.hidden ? () => [0, -4] : undefined;
  }
  hideInVue(node);
  app.canvas?.setDirty(true, true);
}

function after(object, name, then) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    requestAnimationFrame(then); // after the front end's own update
    return result;
  };
}

app.registerExtension({
  name: "HyperAlign.StrengthCurve",
  nodeCreated(node) {
    if (node.comfyClass !== "HyperAlignStrength") return;
    const show = () => showUsedWidgets(node);
    const showAndFit = () => {
      show();
      node.setSize([node.size[0], node.computeSize()[1]]);
    };
    after(node.widgets.find((widget) => widget.name === "mode"), "callback", showAndFit);
    after(node, "onConfigure", show);
    after(node, "onConnectionsChange", show);
    after(node, "onRemoved", () => node.hyperalignRows?.remove());
    requestAnimationFrame(show);
  },
});
