// A node's menu: it gives its layers up for a while, or leaves for good.

import { byId, make, say, sayOrHide } from "./dom.js";
import { json } from "./stream.js";

const WITHOUT_LAYERS = ["draining", "drained", "removing", "aside"];

/** The menu of one node; `updateMenu` tells it how the node stands. */
export function makeMenu(node) {
  const menu = make("details", "menu answers", make("summary", "", "⋯"));
  const drain = make("button");
  const remove = make("button", "", "Remove");
  const now = make("button", "", "Remove at once");
  now.title = "For a machine that must not see another word: its work is not handed over first";
  for (const button of [drain, remove, now]) button.type = "button";
  drain.addEventListener("click", () => ask(menu, node, drain.dataset.verb));
  remove.addEventListener("click", () => {
    const question = `Remove ${node.name}? It is refused then, until it is approved again.`;
    if (confirm(question)) ask(menu, node, "remove");
  });
  now.addEventListener("click", () => {
    const question = `Cut ${node.name} off at once? Others take over what it does, as if it had died.`;
    if (confirm(question)) ask(menu, node, "remove", { now: true });
  });
  menu.append(make("div", "", drain, remove, now));
  return menu;
}

/** Show what can be asked of a node in this state. */
export function updateMenu(menu, node) {
  const [summary, choices] = menu.children;
  const [drain] = choices.children;
  const leaves = WITHOUT_LAYERS.includes(node.state);
  menu.hidden = node.state === "gone";
  summary.ariaLabel = `Menu of ${node.name}`;
  drain.dataset.verb = leaves ? "undrain" : "drain";
  say(drain, leaves ? "Use again" : "Drain");
  drain.title = leaves ? "It may have layers again" : "Take every layer off it; it stays a member";
}

async function ask(menu, node, verb, body = {}) {
  sayOrHide(byId("nodes-error"), null);
  try {
    await json(`admin/nodes/${encodeURIComponent(node.node_id)}/${verb}`, body);
    menu.open = false;
  } catch (error) {
    sayOrHide(byId("nodes-error"), error.message);
  }
}
