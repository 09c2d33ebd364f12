// The page: one stream of events brings everything that it shows.

import { byId, say } from "./elements.js";
import { ask, events, watchDoor } from "./engine.js";
import { showFuture, showFutureHistory } from "./future.js";
import { showHistory, showNow } from "./now.js";
import { showRequests, watchUpload } from "./requests.js";
import { showModel, watchTrial } from "./trial.js";

const RETRY_MS = 2000;

function showStatus(text, isBad) {
  say(byId("status"), text);
  byId("status").classList.toggle("bad", isBad);
}

function show(snapshot) {
  const stalled = snapshot.stalled.length ? `; no progress: ${snapshot.stalled.join(", ")}` : "";
  const away = Object.entries(snapshot.replicas).filter(([, state]) => state !== "ok");
  const others = away.map(([number, state]) => `; replica ${number}: ${state}`).join("");
  showStatus(`${snapshot.status}${stalled}${others}`, snapshot.status !== "ok");
  showNow(snapshot);
  showFuture(snapshot);
  showRequests(snapshot);
}

async function watch() {
  for await (const [name, data] of events(await ask("v1/engine/events"))) {
    const content = JSON.parse(data);
    if (name === "history") {
      showHistory(content);
      showFutureHistory(content);
    } else if (name === "now") {
      show(content);
    }
  }
}

async function watchForever() {
  for (;;) {
    try {
      await watch();
      showStatus("the engine has ended the stream", true);
    } catch (error) {
      showStatus(`no connection: ${error.message}`, true);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

watchDoor();
watchUpload();
watchTrial();
watchForever();
showModel().catch(() => {}); // the model loads; its name is all that is missing
