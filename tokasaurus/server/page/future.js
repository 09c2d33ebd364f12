// Future: the forecast of the KV cache, against what then happened.

import { byId, count, duration, element, say } from "./elements.js";
import { forecastChart, legend } from "./charts.js";

const MOST_USED = 600;
const SHOWN_PAST = 3;
const used = new Map(); // by replica: pairs of a step and pages
const past = new Map(); // by replica: earlier forecasts
let ticks = 0;

export function showFutureHistory(history) {
  for (const [number, pairs] of Object.entries(history.used)) used.set(number, pairs);
  for (const [number, earlier] of Object.entries(history.past)) past.set(number, earlier);
}

export function showFuture(snapshot) {
  ticks += 1;
  showBacklog(snapshot);
  const numbers = Object.keys(snapshot.outlooks);
  for (const number of numbers) remember(number, snapshot.outlooks[number]);
  chooseReplica(numbers);
  const number = byId("replica").value || numbers[0];
  const ahead = snapshot.outlooks[number];
  if (!ahead) return say(byId("forecast"), "The manager has sent no forecast yet.");
  const earlier = (past.get(number) || []).filter((each) => each.step < ahead.step).slice(-SHOWN_PAST - 1, -1);
  const chart = forecastChart({ used: used.get(number), past: earlier, ahead, pages: snapshot.pages });
  byId("forecast").replaceChildren(chart, legend(), element("p", { class: "note", id: "forecast-words" }, words(ahead)));
}

function remember(number, ahead) {
  const pairs = used.get(number) || [];
  if (pairs.length && pairs.at(-1)[0] > ahead.step) pairs.length = 0; // it was started again
  if (!pairs.length || pairs.at(-1)[0] < ahead.step) pairs.push([ahead.step, ahead.used]);
  used.set(number, pairs.slice(-MOST_USED));
  const earlier = past.get(number) || [];
  if (ticks % 5 === 1 && ahead.all_pages.length > 1) earlier.push(ahead);
  past.set(number, earlier.slice(-20));
}

function chooseReplica(numbers) {
  const select = byId("replica");
  byId("replica-choice").hidden = numbers.length < 2;
  if (select.options.length === numbers.length) return;
  const chosen = select.value;
  select.replaceChildren(...numbers.map((number) => element("option", {}, number)));
  if (numbers.includes(chosen)) select.value = chosen;
}

function words(ahead) {
  const admitted = ahead.num_admitted.reduce((sum, each) => sum + each, 0);
  const ended = ahead.num_ended.reduce((sum, each) => sum + each, 0);
  const steps = ahead.all_pages.length * ahead.stride;
  const unseen = ahead.num_unseen > 0 ? `, and ${count(ahead.num_unseen)} more wait behind them` : "";
  return (
    `Within ${count(steps)} steps ${count(ended)} sequences end and ${count(admitted)} of the queue begin${unseen}.`
    + ` A step takes ${(ahead.step_s * 1000).toPrecision(3)} ms.`
  );
}

function showBacklog(snapshot) {
  const { seconds, low, high } = snapshot.backlog;
  let text = "Nothing is in flight.";
  if (snapshot.num_requests && seconds === null) text = "No end is predicted yet.";
  else if (snapshot.num_requests) {
    const band = low === null ? "no band yet: too few predictions have come true" : `from ${duration(low)} to ${duration(high)}`;
    text = `Everything in flight ends in ${duration(seconds)} (${band}).`;
  }
  say(byId("backlog"), text);
  const error = snapshot.forecast_error;
  say(
    byId("forecast-error"),
    error
      ? `So far ${count(error.forecasts)} forecasts of the cache's use were compared with what happened:`
        + ` on average they were ${error.mean_pages} of ${snapshot.pages} pages off.`
      : "No forecast was compared with what happened yet: while the cache is roomy, none is needed.",
  );
}
