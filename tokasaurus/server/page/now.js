// Now: figures with their last ten minutes, and what limits throughput.

import { byId, count, element, say, share } from "./elements.js";
import { sparkline } from "./charts.js";

const MOST = 600;
const FIGURES = [
  ["tokens_out", "Tokens out per second", count],
  ["tokens_in", "Tokens in per second", count],
  ["running", "Sequences running", count],
  ["waiting", "Sequences waiting", count],
  ["in_flight", "Steps in flight", count],
  ["kv_use", "KV cache in use", share, 1],
  ["prefix_hits", "Prompt tokens found in the cache", share, 1],
  ["shared", "Decoding over shared prefixes", share, 1],
  ["device_busy", "Device busy", share, 1],
  ["device_waiting", "Device waiting for the host", share, 1],
];
const samples = [];
const tiles = new Map();

function makeTiles() {
  for (const [name, label] of FIGURES) {
    const output = element("output", { id: `figure-${name}`, "aria-labelledby": `label-${name}` }, "–");
    const chart = element("div");
    const caption = element("figcaption", { id: `label-${name}` }, label);
    byId("tiles").append(element("figure", { class: "tile" }, caption, output, chart));
    tiles.set(name, { output, chart });
  }
}

export function showHistory({ columns, samples: rows }) {
  if (!tiles.size) makeTiles();
  samples.length = 0;
  for (const row of rows) samples.push(Object.fromEntries(columns.map((name, index) => [name, row[index]])));
}

export function showNow(snapshot) {
  const { now, limit } = snapshot;
  say(byId("limit"), limit ? `What limits throughput: ${limit.sentence}` : "Nothing has run yet.");
  if (!now) return;
  if (!samples.length || samples.at(-1).time_s < now.time_s) samples.push(now);
  if (samples.length > MOST) samples.splice(0, samples.length - MOST);
  for (const [name, , written, top] of FIGURES) {
    const { output, chart } = tiles.get(name);
    say(output, written(now[name]));
    chart.replaceChildren(sparkline(samples.map((each) => each[name]), top));
  }
}
