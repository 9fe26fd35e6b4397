// Talking to the scheduler: requests whose failures are sentences, and streamed bodies.

import { authorization, refused } from "./key.js";

/** A failure whose message is a sentence for people. */
export class Failure extends Error {
  status = null; // of the answer, where there was one
}

const UNREACHABLE = "The scheduler does not answer. Is it still running?";

/**
 * Fetch `path` (relative to the page). Throws Failure, or the signal's AbortError.
 *
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>} always one with an ok status
 */
export async function request(path, options = {}) {
  let response;
  const key = authorization();
  const headers = { ...options.headers, ...key };
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    throw explained(error);
  }
  if (response.ok) return response;
  if (response.status === 401) refused(key);
  throw Object.assign(new Failure(await reason(response)), { status: response.status });
}

/**
 * What a GET or a POST of JSON gives, as JSON.
 *
 * @param {string} path
 * @param {unknown} [body] posted when given
 * @param {number} [deadlineMs]
 */
export async function json(path, body, deadlineMs = 15_000) {
  const options = { signal: AbortSignal.timeout(deadlineMs) };
  if (body !== undefined) Object.assign(options, posted(body));
  const response = await request(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw explained(error);
  }
}

/** The parts of RequestInit that post `body` as JSON. */
export function posted(body) {
  return {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
}

/** A network error as a Failure; an abort stays what it is. */
export function explained(error) {
  if (error instanceof Failure || error.name === "AbortError") return error;
  if (error.name === "TimeoutError") {
    return new Failure("The scheduler took too long to answer.");
  }
  return new Failure(UNREACHABLE);
}

/** The sentence in an error response. */
async function reason(response) {
  const sentence = await response
    .json()
    .then((body) => told(body))
    .catch(() => null);
  return sentence ?? `The scheduler answered with status ${response.status}.`;
}

/** The sentence in a body of the shape {"error": {"message": …}}, or null. */
export function told(body) {
  const message = body?.error?.message;
  return typeof message === "string" && message !== "" ? message : null;
}

/** The lines of a body, without their ends, as they arrive. */
export async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield part.endsWith("\r") ? part.slice(0, -1) : part;
    }
    if (rest !== "") yield rest;
  } finally {
    // Ends the transfer when the reader of the lines leaves early; after an abort there is
    // nothing left to end, which is then what cancel() complains of.
    await reader.cancel().catch(() => undefined);
  }
}

/** The `data` of each server-sent event of a body. */
export async function* events(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line === "") {
      if (data.length > 0) yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
    }
  }
}
