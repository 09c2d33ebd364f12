// Try it: a chat or a completion, with the probabilities of its tokens.

import { byId, element, say } from "./elements.js";
import { ask, events, post } from "./engine.js";

const TOP = 5;
const UNLIKELY = 0.1;
const messages = []; // of the conversation so far
let request = null; // an AbortController while an answer comes

const kind = () => document.querySelector("input[name=kind]:checked").value;
const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));

export function watchTrial() {
  byId("trial-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => request?.abort());
  byId("forget").addEventListener("click", forget);
  for (const each of document.querySelectorAll("input[name=kind]")) each.addEventListener("change", showKind);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("trial-form").requestSubmit();
  });
}

function showKind() {
  for (const each of document.querySelectorAll(".chat-only")) each.hidden = kind() !== "chat";
  forget();
}

function forget() {
  messages.length = 0;
  byId("conversation").replaceChildren();
  byId("answers").replaceChildren();
  byId("prompt-tokens").hidden = true;
  say(byId("usage"), "");
}

function body() {
  const asked = {
    temperature: number("temperature"),
    top_p: number("top-p"),
    top_k: number("top-k") || undefined,
    max_tokens: number("max-tokens"),
    n: number("samples"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
  const schema = byId("schema").value.trim();
  if (schema) {
    asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  }
  const wanted = byId("probabilities").checked;
  if (kind() === "chat") {
    const system = byId("system").value.trim();
    const before = system ? [{ role: "system", content: system }] : [];
    asked.messages = [...before, ...messages, { role: "user", content: byId("prompt").value }];
    if (wanted) Object.assign(asked, { logprobs: true, top_logprobs: TOP });
  } else {
    asked.prompt = byId("prompt").value;
    if (wanted) asked.logprobs = TOP;
  }
  return asked;
}

async function send() {
  say(byId("trial-problem"), "");
  byId("prompt-tokens").hidden = true;
  request = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  let asked = null;
  try {
    asked = body();
    const columns = makeColumns(asked.n || 1);
    const path = asked.messages ? "v1/chat/completions" : "v1/completions";
    const answer = await post(path, asked, { signal: request.signal });
    await read(answer, asked, columns);
    if (asked.messages) keep(asked, columns);
  } catch (error) {
    if (error.name !== "AbortError") say(byId("trial-problem"), error.message);
  } finally {
    request = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
}

function makeColumns(numSamples) {
  const columns = Array.from({ length: numSamples }, (_, index) => {
    const text = element("p", { class: "text" });
    const title = element("h3", {}, numSamples > 1 ? `Sample ${index + 1}` : "Answer");
    return { text, title, content: "", node: element("div", { class: "answer" }, title, text) };
  });
  byId("answers").replaceChildren(...columns.map((each) => each.node));
  return columns;
}

async function read(answer, asked, columns) {
  for await (const [, data] of events(answer)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices || []) {
      const column = columns[choice.index];
      add(column, choice);
      if (choice.finish_reason) say(column.title, `${column.title.textContent}: ${choice.finish_reason}`);
    }
    if (chunk.usage) showUsage(chunk.usage, asked);
  }
}

function add(column, choice) {
  const found = choice.delta ? chatTokens(choice) : completionTokens(choice);
  const content = (choice.delta ? choice.delta.content : choice.text) || "";
  column.content += content;
  // A character may be spread over several tokens: then their texts are not the content.
  const isWhole = found.map((each) => each.text).join("").startsWith(content);
  if (found.length && isWhole) column.text.append(...found.map(tokenNode));
  else column.text.append(content);
}

function chatTokens(choice) {
  const content = choice.logprobs?.content || [];
  return content.map((each) => ({
    text: each.token,
    logprob: each.logprob,
    others: each.top_logprobs.map((other) => [other.token, other.logprob]),
  }));
}

function completionTokens(choice) {
  const logprobs = choice.logprobs;
  if (!logprobs?.tokens) return [];
  return logprobs.tokens.map((text, index) => ({
    text,
    logprob: logprobs.token_logprobs[index],
    others: Object.entries(logprobs.top_logprobs?.[index] || {}),
  }));
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)}%`;

function tokenNode(token) {
  const isUnlikely = Math.exp(token.logprob) < UNLIKELY;
  const node = element("span", { class: isUnlikely ? "token unlikely" : "token", tabindex: "0" }, token.text);
  node.setAttribute("aria-label", `${token.text}, ${percent(token.logprob)}`);
  const show = () => showCard(node, token);
  const hide = () => (byId("token-card").hidden = true);
  node.addEventListener("mouseenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("mouseleave", hide);
  node.addEventListener("blur", hide);
  return node;
}

function showCard(node, token) {
  const card = byId("token-card");
  const lines = token.others.some(([text]) => text === token.text) ? token.others : [[token.text, token.logprob], ...token.others];
  const body = element("tbody");
  for (const [text, logprob] of lines) {
    body.append(element("tr", {}, element("td", {}, JSON.stringify(text)), element("td", {}, percent(logprob))));
  }
  card.replaceChildren(element("table", {}, body));
  card.hidden = false;
  const place = node.getBoundingClientRect();
  card.style.left = `${Math.min(place.left, innerWidth - 180) + scrollX}px`;
  card.style.top = `${place.bottom + scrollY + 4}px`;
}

function keep(asked, columns) {
  const user = asked.messages.at(-1);
  const assistant = { role: "assistant", content: columns[0].content };
  messages.push(user, assistant);
  const spoken = [user, assistant].map((each) =>
    element("div", { class: "message" }, element("b", {}, each.role), element("p", { class: "text" }, each.content)),
  );
  byId("conversation").append(...spoken);
  byId("prompt").value = "";
}

async function showUsage(usage, asked) {
  const cached = usage.prompt_tokens_details?.cached_tokens || 0;
  const isShared = asked.n > 1;
  const samples = isShared
    ? ` The prompt (underlined) is computed once for all ${asked.n} samples, which share it.`
    : "";
  say(
    byId("usage"),
    `${usage.prompt_tokens} prompt tokens, of which ${cached} were found in the cache (marked below);`
      + ` ${usage.completion_tokens} tokens generated.${samples}`,
  );
  const text = asked.messages ? { messages: asked.messages } : { prompt: asked.prompt };
  try {
    const answer = await post("tokenize", { ...text, return_token_strs: true });
    const { token_strs: strings } = await answer.json();
    const box = byId("prompt-tokens");
    box.replaceChildren(
      element("span", { class: "cached" }, strings.slice(0, cached).join("")),
      element("span", {}, strings.slice(cached).join("")),
    );
    box.classList.toggle("shared", isShared);
    box.hidden = false;
  } catch {
    byId("prompt-tokens").hidden = true; // the numbers say enough
  }
}

/** Names the model. */
export async function showModel() {
  const { data } = await (await ask("v1/models")).json();
  document.title = `${data[0].id} · Tokasaurus`;
  say(byId("model"), data[0].id);
}
