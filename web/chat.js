// The conversation: kept in this page's memory, streamed answer by answer.

import { byId, make, say, sayOrHide } from "./dom.js";
import { Failure, events, explained, posted, request, told } from "./stream.js";
import { count, duration } from "./words.js";

const DEADLINE_MS = 660_000; // a little over the scheduler's own
const METER_MS = 250;
// Wilder than this, answers wander; the built-in model is too small for any chance at all.
const TEMPERATURE = 0.7;
const TEMPERATURE_BUILTIN = 0;
const BROKEN = "The connection broke before the answer was complete.";

const BUILTIN = "builtin";
const IDEAS = ["What is the sea made of?", "Write a haiku about rain.", "What is 17 times 23?"];
const IDEAS_BUILTIN = ["What is Parallax?", "Count to 20.", "Tell me a story.", "What is 3 + 4?"];

/** The part of the page that asks and shows answers. */
export function chat() {
  const question = byId("question");
  const scroll = byId("scroll");
  let exchanges = []; // {question, answer}, oldest first
  let running = null; // AbortController of the answer under way
  let model = null; // name, once it can be asked

  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(question.value.trim());
  });
  question.addEventListener("input", grow);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit(question.value.trim());
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    exchanges = [];
    byId("log").replaceChildren();
    shape();
    question.focus();
  });

  function submit(text) {
    if (text === "" || running || !model) return;
    question.value = "";
    grow();
    const exchange = { question: text, answer: "" };
    const view = makeExchange(text);
    view.again.addEventListener("click", () => {
      if (running || !model) return;
      byId("log").append(view.root); // it becomes the newest
      exchanges = [...exchanges.filter((other) => other !== exchange), exchange];
      ask(exchange, view);
    });
    exchanges.push(exchange);
    byId("log").append(view.root);
    ask(exchange, view);
  }

  async function ask(exchange, view) {
    const controller = new AbortController();
    const late = new DOMException("", "TimeoutError");
    const deadline = setTimeout(() => controller.abort(late), DEADLINE_MS);
    const meter = new Meter();
    const history = exchanges.slice(0, exchanges.indexOf(exchange));
    running = controller;
    exchange.answer = "";
    view.begin();
    shape();
    scroll.scrollTop = scroll.scrollHeight;
    let end = "";
    try {
      end = await stream(model, history, exchange, controller.signal, meter, (text) => {
        const pinned = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
        view.add(text, meter);
        if (pinned) scroll.scrollTop = scroll.scrollHeight;
      });
      if (end === "length") view.end(meter, "ended at the most tokens allowed");
      else view.end(meter);
    } catch (error) {
      if (controller.signal.aborted && controller.signal.reason !== late) {
        view.end(meter, "stopped");
      } else {
        view.fail(meter, explained(error).message);
        view.root.scrollIntoView({ block: "end" });
      }
    } finally {
      clearTimeout(deadline);
      if (running === controller) running = null;
      shape();
    }
  }

  /** Show what the conversation's state allows. */
  function shape() {
    const wasStop = document.activeElement === byId("stop");
    const wasSend = document.activeElement === byId("send");
    byId("empty").hidden = exchanges.length > 0;
    byId("chat-new").disabled = exchanges.length === 0;
    byId("send").hidden = running !== null;
    byId("send").disabled = !model;
    byId("stop").hidden = running === null;
    byId("log").setAttribute("aria-busy", String(running !== null));
    if (wasSend && running) byId("stop").focus();
    if (wasStop && !running) byId("send").focus();
  }

  function grow() {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight + 2}px`; // and its two borders
  }

  return {
    update(status) {
      const ready = status.status === "available" ? status.model_name : null;
      say(byId("empty-title"), ready ? "Ask anything." : "Not ready to chat yet.");
      say(byId("empty-text"), invitation(status));
      if (ready !== model || byId("ideas").childElementCount === 0) {
        model = ready;
        const ideas = ready === BUILTIN ? IDEAS_BUILTIN : IDEAS;
        byId("ideas").replaceChildren(
          ...ideas.map((idea) => {
            const button = make("button", "", idea);
            button.type = "button";
            button.addEventListener("click", () => submit(idea));
            return make("li", "", button);
          }),
        );
        byId("ideas").hidden = !ready;
        shape();
      }
    },
  };
}

/** What to expect of an empty conversation. */
function invitation(status) {
  if (!status.model_name) return "Choose a model first.";
  if (status.status !== "available") return "It begins as soon as the nodes have the model.";
  const stages = status.rings[0]?.stages.length ?? 0;
  if (stages < 2) return `${status.model_name} runs on one node.`;
  return `Each token of an answer passes through ${stages} nodes.`;
}

/**
 * One streamed answer. Resolves to its finish reason.
 *
 * Exchanges without an answer are left out of the history: models expect turns to alternate.
 */
async function stream(model, history, exchange, signal, meter, onText) {
  const messages = history
    .filter((past) => past.answer !== "")
    .flatMap((past) => [
      { role: "user", content: past.question },
      { role: "assistant", content: past.answer },
    ]);
  messages.push({ role: "user", content: exchange.question });
  const body = {
    model,
    messages,
    temperature: model === BUILTIN ? TEMPERATURE_BUILTIN : TEMPERATURE,
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await request("v1/chat/completions", { ...posted(body), signal });
  let finish = "";
  for await (const data of whole(events(response.body))) {
    if (data === "[DONE]") return finish;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(told(chunk) ?? "The scheduler ended the answer.");
    if (chunk.usage) meter.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (choice?.finish_reason) finish = choice.finish_reason;
    const text = choice?.delta?.content;
    if (text) {
      meter.tick();
      exchange.answer += text;
      onText(text);
    }
  }
  throw new Failure(BROKEN);
}

/** The same items; a network error on the way becomes a sentence. */
async function* whole(items) {
  try {
    yield* items;
  } catch (error) {
    throw error instanceof TypeError ? new Failure(BROKEN) : error;
  }
}

/** Times of one answer. */
class Meter {
  started = performance.now();
  first = null; // when the first text came
  last = null;
  pieces = 0; // a piece is a token, or a few that only make sense together
  tokens = null; // as the scheduler counted them, at the end

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  /** "85 ms to first token · 42.1 tokens/s · 128 tokens" */
  toString() {
    if (this.first === null) return "";
    const tokens = this.tokens ?? this.pieces;
    const parts = [`${duration(this.first - this.started)} to first token`];
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) {
      const speed = (tokens - 1) / seconds;
      parts.push(`${speed < 100 ? speed.toFixed(1) : count(Math.round(speed))} tokens/s`);
    }
    parts.push(`${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
    return parts.join(" · ");
  }
}

/** The elements of one question and its answer. */
function makeExchange(text) {
  const answer = make("p", "text");
  const facts = make("p", "facts");
  const problem = make("p", "problem");
  const again = make("button", "again", "Try again");
  again.type = "button";
  const root = make(
    "article",
    "exchange",
    make("p", "question", make("span", "unseen", "You: "), text),
    make("div", "answer", make("span", "unseen", "Answer: "), answer, facts, problem, again),
  );
  let metered = 0;
  const rest = (meter, note) => {
    root.classList.remove("waiting", "streaming");
    say(facts, [String(meter), note].filter(Boolean).join(" · "));
  };
  return {
    root,
    again,
    begin() {
      root.classList.add("waiting", "streaming");
      answer.replaceChildren();
      say(facts, "");
      sayOrHide(problem, null);
      again.hidden = true;
    },
    add(piece, meter) {
      root.classList.remove("waiting");
      answer.append(piece);
      if (meter.last - metered < METER_MS) return;
      metered = meter.last;
      say(facts, String(meter));
    },
    end(meter, note = "") {
      answer.normalize();
      rest(meter, note);
    },
    fail(meter, sentence) {
      answer.normalize();
      rest(meter, "");
      sayOrHide(problem, sentence);
      again.hidden = false;
    },
  };
}
