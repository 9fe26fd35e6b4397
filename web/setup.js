// Choosing the model and the number of nodes, and the command that other machines join with.

import { byId, make, say, sayOrHide } from "./dom.js";
import { json } from "./stream.js";
import { bytes, count, plural } from "./words.js";

const OTHER = ""; // the entry of the list that asks for a name
const JOIN_MS = 60_000; // its token may have been revoked
const INIT_MS = 60_000; // the folder is looked at before the answer, and running answers end

/** The part of the page that shows and changes the model. */
export function setup() {
  let current = null; // name of the cluster's model; null before the first status
  let listed = false;
  let joinCommand = ""; // without its token, as everybody may see it
  let joinAsked = 0; // when the one with the token was asked for
  let touched = false; // whether the number of nodes is the person's own

  byId("choose-nodes").addEventListener("input", () => {
    touched = true;
  });
  byId("choose-model").addEventListener("change", () => {
    const other = byId("choose-model").value === OTHER;
    byId("choose-other-label").hidden = !other;
    byId("choose-other").required = other;
    if (other) byId("choose-other").focus();
  });

  byId("choose").addEventListener("submit", async (event) => {
    event.preventDefault();
    const start = byId("choose-start");
    const name = byId("choose-model").value || byId("choose-other").value.trim();
    start.disabled = true;
    sayOrHide(byId("choose-error"), null);
    try {
      await json(
        "scheduler/init",
        {
          model_name: name,
          init_nodes_num: Number(byId("choose-nodes").value),
          is_local_network: true,
        },
        INIT_MS,
      );
      byId("choice").open = false;
    } catch (error) {
      sayOrHide(byId("choose-error"), error.message);
    } finally {
      start.disabled = false;
    }
  });

  byId("join-copy").addEventListener("click", async () => {
    const copied = await copy(byId("join-command"));
    say(
      byId("join-said"),
      copied ? "Copied." : "The command is selected: copy it with the keyboard.",
    );
  });

  async function list() {
    listed = true;
    try {
      fill((await json("model/list")).data, current);
    } catch (error) {
      listed = false; // the next status tries again
      sayOrHide(byId("choose-error"), error.message);
    }
  }

  /** The join command with its token, for those who may see it; it changes now and then. */
  async function askJoin() {
    joinAsked = performance.now();
    try {
      const command = await json("node/join/command").catch(unlessForbidden);
      // Whoever may not let machines in may not choose the model either.
      for (const part of ["join", "choice"]) byId(part).hidden = command === null;
      for (const part of ["pending", "nodes"]) {
        byId(part).classList.toggle("look-only", command === null);
      }
      if (command !== null) say(byId("join-command"), command.data);
    } catch {
      joinAsked = 0; // the next status tries again
    }
  }

  return {
    update(status) {
      const name = status.model_name ?? "";
      const old = performance.now() - joinAsked > JOIN_MS;
      if (status.node_join_command !== joinCommand || joinAsked === 0 || old) {
        joinCommand = status.node_join_command ?? "";
        askJoin();
      }
      if (name !== current) {
        current = name;
        byId("choice").open = name === "";
        touched = false;
        say(byId("choice-title"), name ? "Change the model" : "Choose a model");
        say(byId("choose-start"), name ? "Switch" : "Start");
        listed = false;
      }
      if (!touched) {
        const nodes = Math.max(1, status.init_nodes_num, name ? 0 : status.node_list.length);
        byId("choose-nodes").value = String(nodes);
      }
      byId("model").hidden = name === "";
      say(byId("model-name"), name);
      say(byId("model-facts"), status.model ? facts(status.model) : "");
      if (!listed) list();
    },
    lost() {
      listed = false; // another scheduler may answer next
      joinAsked = 0;
    },
  };
}

/** Null for what this key may not see; throws any other failure. */
function unlessForbidden(error) {
  if (error.status === 403) return null;
  throw error;
}

/** Size and shape of a model in one line. */
function facts(model) {
  return [
    plural(model.layers, "layer"),
    bytes(model.weight_bytes),
    `context of ${count(model.context_tokens)} tokens`,
  ].join(" · ");
}

/** The list's entries, with the current model chosen. */
function fill(models, current) {
  const select = byId("choose-model");
  const chosen = select.value || current;
  const options = models.map((model) => {
    const details = [model.size, model.provider].filter(Boolean).join(", ");
    const option = make("option", "", details ? `${model.name} (${details})` : model.name);
    option.value = model.name;
    return option;
  });
  const other = make("option", "", "Another model…");
  other.value = OTHER;
  select.replaceChildren(...options, other);
  const names = models.map((model) => model.name);
  select.value = names.includes(chosen) ? chosen : (names[0] ?? OTHER);
  select.dispatchEvent(new Event("change"));
}

/**
 * Put an element's text on the clipboard; false when the browser does not allow it, and then
 * the text is selected. Pages that are not from this machine nor encrypted have no
 * navigator.clipboard, hence the second way.
 */
async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
