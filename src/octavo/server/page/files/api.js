/** Calls of the server: keys, errors, streams of events. Addresses are relative, so that a proxy may add a prefix. */

/** An error that the server has answered. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const PREFIX = "octavo-key-";
let askForKey = async () => false;

/**
 * Set what is called when the server wants another key: with "client" or "admin" and the server's message. It returns
 * whether a key was entered.
 */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Return the key of this kind ("client" or "admin"); "" if there is none. */
export function getKey(kind) {
  return sessionStorage.getItem(PREFIX + kind) ?? localStorage.getItem(PREFIX + kind) ?? "";
}

/** Keep a key until the tab is closed, or with `remember` in this browser. "" forgets it. */
export function setKey(kind, key, remember) {
  sessionStorage.removeItem(PREFIX + kind);
  localStorage.removeItem(PREFIX + kind);
  if (key) (remember ? localStorage : sessionStorage).setItem(PREFIX + kind, key);
}

/**
 * Send a request, and ask for a key when the server wants one.
 * @param {string} path Such as "v1/models".
 * @param {{body?: any, signal?: AbortSignal, kind?: "client"|"admin", quiet?: boolean}} options `quiet`: do not ask.
 * @returns {Promise<Response>} A successful response. Throws ApiError otherwise.
 */
export async function request(path, { body, signal, kind = "client", quiet = false } = {}) {
  for (;;) {
    const key = getKey(kind);
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    if (body !== undefined) headers["content-type"] = "application/json";
    const response = await fetch(new URL(path, document.baseURI), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status === 401 && getKey(kind) !== key) continue; // entered meanwhile for another request
    if (error.status !== 401 || quiet || !(await askOnce(kind, error.message))) throw error;
  }
}

/** Return the JSON of an answer; see `request`. */
export async function json(path, options) {
  return (await request(path, options)).json();
}

const asked = new Map();

function askOnce(kind, message) {
  if (!asked.has(kind))
    asked.set(
      kind,
      askForKey(kind, message).finally(() => asked.delete(kind)),
    );
  return asked.get(kind);
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.code ?? error.type, error.message);
  } catch {
    return new ApiError(response.status, "", `the server answered ${response.status}`);
  }
}

/**
 * Yield the server-sent events of a response.
 * @param {Response} response
 * @returns {AsyncGenerator<{event: string, data: string}>}
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = parsed(part);
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(part) {
  let event = "message";
  const data = [];
  for (const line of part.split("\n")) {
    if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    else if (line.startsWith("event:")) event = line.slice(6).trim();
  }
  return { event, data: data.join("\n") };
}

/**
 * Stream a chat completion.
 * @param {Object} body The body of /v1/chat/completions.
 * @param {AbortSignal} signal Ends the request; the server then stops computing.
 * @returns {AsyncGenerator<Object>} The chunks. Throws ApiError.
 */
export async function* streamChat(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { body: { ...body, ...options }, signal });
  for await (const { data } of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.status ?? 0, chunk.error.code, chunk.error.message);
    yield chunk;
  }
}
