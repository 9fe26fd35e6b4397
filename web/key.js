// The API key, where the scheduler asks for one: asked for once, kept for this tab, sent along.

import { byId, say, sayOrHide } from "./dom.js";

const NAME = "parallax.key";

let key = remembered();
let asking = null; // {promise, resolve} while the form is shown

/** The header that brings the key; none before one is given. */
export const authorization = () => (key === null ? {} : { Authorization: `Bearer ${key}` });

/** Whether the page waits for a key. */
export const locked = () => asking !== null;

/** Resolves when no key is waited for. */
export const unlocked = () => asking?.promise ?? Promise.resolve();

/**
 * The scheduler refused `sent`, the headers of a request: ask for another key.
 *
 * @param {{Authorization?: string}} sent
 */
export function refused(sent) {
  if (sent.Authorization !== authorization().Authorization) return; // an older one; the new may do
  const tried = key !== null;
  remember(null);
  if (asking === null) {
    asking = {};
    asking.promise = new Promise((resolve) => {
      asking.resolve = resolve;
    });
  }
  document.body.classList.add("locked");
  byId("state").dataset.tone = "quiet";
  say(byId("state"), "An API key is needed");
  sayOrHide(byId("unlock-error"), tried ? "The scheduler does not know this key." : null);
  byId("unlock").hidden = false;
  byId("unlock-key").focus();
}

byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("unlock-key").value.trim();
  if (given === "") return;
  remember(given);
  byId("unlock-key").value = "";
  byId("unlock").hidden = true;
  document.body.classList.remove("locked");
  say(byId("state"), "Connecting");
  asking?.resolve();
  asking = null;
});

function remembered() {
  try {
    return sessionStorage.getItem(NAME);
  } catch {
    return null; // the browser keeps nothing for pages: the key is asked for at each visit
  }
}

function remember(value) {
  key = value;
  try {
    if (value === null) sessionStorage.removeItem(NAME);
    else sessionStorage.setItem(NAME, value);
  } catch {
    // As above.
  }
}
