// The OpenAPI document, readable.

import { byId, element, say } from "./elements.js";
import { ask, watchDoor } from "./engine.js";

function operation(path, method, described) {
  const body = described.requestBody?.content;
  const parts = [element("p", {}, described.description || described.summary || "")];
  if (body) parts.push(element("h3", {}, "Body"), element("pre", {}, JSON.stringify(body, null, 1)));
  if (described.parameters) parts.push(element("h3", {}, "Parameters"), element("pre", {}, JSON.stringify(described.parameters, null, 1)));
  const answer = described.responses?.["200"]?.content;
  if (answer) parts.push(element("h3", {}, "Answer"), element("pre", {}, JSON.stringify(answer, null, 1)));
  return element("details", {}, element("summary", {}, `${method.toUpperCase()} ${path}`), ...parts);
}

async function show() {
  const found = await (await ask("openapi.json")).json();
  const nodes = [];
  for (const [path, operations] of Object.entries(found.paths)) {
    for (const [method, described] of Object.entries(operations)) nodes.push(operation(path, method, described));
  }
  nodes.push(element("h2", {}, "Schemas"));
  for (const [name, schema] of Object.entries(found.components.schemas)) {
    nodes.push(element("details", {}, element("summary", {}, name), element("pre", {}, JSON.stringify(schema, null, 1))));
  }
  byId("operations").replaceChildren(...nodes);
  say(byId("status"), `version ${found.info.version}`);
}

watchDoor();
show().catch((error) => say(byId("status"), error.message));
