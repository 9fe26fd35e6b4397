// The cluster as it is now: its state in a word, its rings and their layers, its nodes.

import { byId, keep, make, say, sayOrHide } from "./dom.js";
import { locked, unlocked } from "./key.js";
import { makeMenu, updateMenu } from "./leaving.js";
import { lines, request } from "./stream.js";
import { bytes, count, layers, percent, plural, range } from "./words.js";

const SILENCE_MS = 5_000; // the scheduler says something each second
const AGAIN_MS = 1_000;

/**
 * Follow GET /cluster/status for as long as the page is open, over and over.
 *
 * A hidden tab lets go of its stream: browsers allow six connections per server, and forgotten
 * tabs must not use them up.
 *
 * @param {{onStatus: (status: object) => void, onLost: () => void}} listeners
 */
export async function watch({ onStatus, onLost }) {
  for (;;) {
    await visible();
    await unlocked();
    try {
      await follow(onStatus);
    } catch {
      // Whatever ended the stream, the answer is the same: say so, and connect again.
    }
    if (locked()) continue;
    if (!document.hidden) onLost();
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

/** One stream, until it ends, falls silent or the page is hidden. */
async function follow(onStatus) {
  const controller = new AbortController();
  const end = () => controller.abort();
  const endWhenHidden = () => document.hidden && end();
  let silence = setTimeout(end, SILENCE_MS);
  document.addEventListener("visibilitychange", endWhenHidden);
  try {
    const response = await request("cluster/status", { signal: controller.signal });
    for await (const line of lines(response.body)) {
      clearTimeout(silence);
      silence = setTimeout(end, SILENCE_MS);
      if (line === "") continue;
      const message = JSON.parse(line);
      if (message.type === "cluster_status") onStatus(message.data);
    }
  } finally {
    clearTimeout(silence);
    document.removeEventListener("visibilitychange", endWhenHidden);
    end();
  }
}

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", () => resolve(), { once: true });
  });
}

/** The part of the page that shows state, rings and nodes. */
export function cluster() {
  return {
    update(status) {
      document.body.classList.remove("lost");
      const { tone, text } = summary(status);
      byId("state").dataset.tone = tone;
      byId("state").ariaLive = text.endsWith("%") ? "off" : "polite"; // not each percent aloud
      say(byId("state"), text);
      sayOrHide(byId("problem"), status.problem);
      sayOrHide(byId("notice"), status.notice);
      byId("layers").hidden = status.rings.length === 0;
      keep(byId("rings"), status.rings, (ring) => String(ring.epoch), makeRing, (element, ring) =>
        updateRing(element, ring, status),
      );
      updateNodes(status);
    },
    lost() {
      document.body.classList.add("lost");
      byId("state").dataset.tone = "bad";
      say(byId("state"), "No connection to the scheduler, trying again");
    },
  };
}

/** The cluster's state in a few words. */
function summary(status) {
  if (status.choosing) return { tone: "busy", text: `Fetching ${status.choosing}` };
  if (status.status === "available") return { tone: "good", text: "Ready" };
  if (!status.model_name) return { tone: "quiet", text: "No model chosen" };
  const done = loaded(status.node_list);
  if (done !== null) return { tone: "busy", text: `Loading ${percent(done)}` };
  const missing = status.init_nodes_num - present(status).length;
  if (missing > 0) return { tone: "busy", text: `Waiting for ${plural(missing, "more node")}` };
  if (status.missing_bytes) {
    return { tone: "bad", text: `${bytes(status.missing_bytes)} of memory missing` };
  }
  if (status.need_more_nodes) return { tone: "busy", text: "Waiting for more nodes" };
  return { tone: "busy", text: "Forming the ring" };
}

/** How far all loading nodes together are, or null when none loads. */
function loaded(nodes) {
  const loads = nodes.map((node) => node.load).filter((load) => load && load.fraction < 1);
  if (loads.length === 0) return null;
  const total = loads.reduce((sum, load) => sum + load.total_bytes, 0);
  if (total === 0) return 0;
  return loads.reduce((sum, load) => sum + load.done_bytes, 0) / total;
}

const present = (status) => status.node_list.filter((node) => node.state !== "gone");

function makeRing() {
  const ring = make("div", "ring");
  ring.append(make("ol", "stages"), make("div", "way-back"), make("p", "facts"));
  return ring;
}

function updateRing(element, ring, status) {
  const [stages, , facts] = element.children;
  const nodes = new Map(status.node_list.map((node) => [node.node_id, node]));
  const running = ring.load.decoding + ring.load.prefilling;
  element.classList.toggle("ready", ring.status === "ready");
  element.classList.toggle("running", running > 0);
  keep(stages, ring.stages, (stage) => stage.node_id, makeStage, (child, stage) =>
    updateStage(child, stage, ring, nodes.get(stage.node_id)),
  );
  const state = running > 0 ? `${plural(running, "answer")} under way` : "Idle";
  const parts = [ring.status === "ready" ? state : "Forming"];
  const waiting = status.queue.waiting;
  if (waiting > 0) parts.push(`${count(waiting)} waiting`);
  say(facts, parts.join(" · "));
}

function makeStage() {
  return make("li", "stage", make("div", "bar"), make("strong"), make("span", "held"));
}

function updateStage(element, stage, ring, node) {
  const [bar, name, held] = element.children;
  const size = stage.layers[1] - stage.layers[0];
  const done = ring.status === "ready" ? 1 : (node?.load?.fraction ?? 0);
  element.style.flexGrow = String(size);
  bar.style.setProperty("--layers", String(size));
  bar.style.setProperty("--done", String(done));
  say(name, stage.name);
  say(held, range(stage.layers));
  element.title = `${stage.name}: ${layers(stage.layers)}`;
}

function updateNodes(status) {
  const here = present(status).length;
  const wanted = Math.max(0, status.init_nodes_num - here);
  say(byId("nodes-count"), status.init_nodes_num > 0 ? `${here} of ${status.init_nodes_num}` : "");
  const rows = [...status.node_list, ...Array.from({ length: Math.min(wanted, 8) }, () => null)];
  keep(
    byId("nodes"),
    rows,
    (node, index) => node?.node_id ?? `place ${index}`,
    makeNode,
    updateNode,
  );
}

function makeNode(node) {
  const parts = [make("strong"), make("span", "facts"), make("span", "doing")];
  if (node) parts.push(makeMenu(node));
  return make("li", "node", make("i", "dot"), ...parts);
}

function updateNode(element, node) {
  const [, name, facts, doing, menu] = element.children;
  element.dataset.state = node ? mood(node) : "awaited";
  say(name, node ? node.name : "Waiting for a node");
  say(facts, node ? `${node.chip} · ${bytes(node.memory_bytes)}` : "");
  say(doing, node ? activity(node) : "");
  doing.title = node?.aside ? node.aside.why : "";
  if (menu) updateMenu(menu, node);
  name.title = node ? `${node.node_id}\n${bytes(node.budget_bytes)} for weights and caches` : "";
}

const mood = (node) => (node.load && node.load.fraction < 1 ? "loading" : node.state);

/** What a node is doing, in a few words. */
function activity(node) {
  if (node.state === "suspect") return "not answering";
  if (node.state === "gone") return "gone";
  if (node.state === "aside") return "put aside";
  if (node.load && node.load.fraction < 1) {
    return `${node.load.phase || "loading"} ${percent(node.load.fraction)}`;
  }
  if (["joining", "draining", "drained", "removing"].includes(node.state)) return node.state;
  return node.layers ? layers(node.layers) : "idle";
}
