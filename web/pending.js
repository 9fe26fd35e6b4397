// Nodes that wait to be let in: who they say they are, their fingerprint, and the two answers.

import { byId, keep, make, say, sayOrHide } from "./dom.js";
import { json } from "./stream.js";

/** The part of the page where nodes are let in. */
export function pending() {
  return {
    update(status) {
      const nodes = status.pending_nodes ?? [];
      byId("pending-part").hidden = nodes.length === 0;
      keep(byId("pending"), nodes, (node) => node.node_id, makeRow, updateRow);
    },
  };
}

function makeRow(node) {
  const row = make("li", "asks");
  const letIn = make("button", "primary", "Let in");
  const refuse = make("button", "", "Refuse");
  for (const button of [letIn, refuse]) button.type = "button";
  letIn.addEventListener("click", () => decide(row, node.node_id, "approve"));
  refuse.addEventListener("click", () => decide(row, node.node_id, "deny"));
  row.append(
    make("strong"),
    make("span", "facts"),
    make("code"),
    make("div", "answers", letIn, refuse),
  );
  return row;
}

function updateRow(row, node) {
  const [name, facts, mark, answers] = row.children;
  const called = node.name || "A node without a name";
  say(name, called);
  say(facts, node.address);
  say(mark, node.fingerprint);
  mark.ariaLabel = `Fingerprint ${node.fingerprint}`;
  answers.children[0].ariaLabel = `Let ${called} in`;
  answers.children[1].ariaLabel = `Refuse ${called}`;
  name.title = node.node_id;
}

/** Tell the scheduler; the row goes with the next status. */
async function decide(row, nodeId, verb) {
  const buttons = [...row.querySelectorAll("button")];
  for (const button of buttons) button.disabled = true;
  sayOrHide(byId("pending-error"), null);
  try {
    await json(`admin/nodes/${encodeURIComponent(nodeId)}/${verb}`, {});
  } catch (error) {
    sayOrHide(byId("pending-error"), error.message);
    for (const button of buttons) button.disabled = false;
  }
}
