// Talks to the engine. The key is kept for this tab, and sent in a header: there are no cookies.

import { byId, say } from "./elements.js";

const KEY = "tokasaurus-key";
const waiting = [];

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** Opens the form for a key; resolves when one was typed in. */
function typedKey(problem) {
  const door = byId("door");
  say(byId("door-problem"), problem);
  if (door.hidden) {
    door.hidden = false;
    byId("key").focus();
  }
  return new Promise((resolve) => waiting.push(resolve));
}

export function watchDoor() {
  byId("door").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key").value.trim());
    byId("key").value = "";
    byId("door").hidden = true;
    for (const resolve of waiting.splice(0)) resolve();
  });
}

/** An answer of the engine. Throws an Error with the engine's own words. */
export async function ask(path, options = {}) {
  for (;;) {
    const used = sessionStorage.getItem(KEY);
    const answer = await fetch(path, {
      ...options,
      headers: headers(options.headers),
      credentials: "omit",
    });
    if (answer.status === 401) {
      const problem = await problemOf(answer);
      if (sessionStorage.getItem(KEY) === used) await typedKey(used ? problem : "");
      continue;
    }
    if (!answer.ok) throw new Error(await problemOf(answer));
    return answer;
  }
}

async function problemOf(answer) {
  try {
    const body = await answer.json();
    return body.error.message;
  } catch {
    return `the engine answered with status ${answer.status}`;
  }
}

export async function post(path, body, options = {}) {
  return ask(path, {
    ...options,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

/** The server-sent events of an answer: pairs of a name and data. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        let name = "message";
        let data = "";
        for (const line of part.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          else if (line.startsWith("data: ")) data += line.slice(6);
        }
        yield [name, data];
      }
    }
  } finally {
    // Where the reader stops early, the connection would stay open. Its own failure is known.
    reader.cancel().catch(() => {});
  }
}

/** Saves a file of the engine. A link would not send the key. */
export async function save(path, name) {
  const answer = await ask(path);
  const address = URL.createObjectURL(await answer.blob());
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
