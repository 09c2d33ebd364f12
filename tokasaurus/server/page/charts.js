// Charts as SVG: a line of the last minutes, and the forecast.

import { drawing, element } from "./elements.js";

/** The path of points, each a pair of coordinates. */
function path(points) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

/** A line without axes. */
export function sparkline(values, top) {
  const most = Math.max(top || 0, ...values, 1e-9);
  const width = 200;
  const height = 40;
  const step = width / Math.max(1, values.length - 1);
  const points = values.map((value, index) => [index * step, height - 2 - (height - 4) * (value / most)]);
  const view = { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" };
  return drawing("svg", view, drawing("path", { d: path(points) }));
}

const WIDTH = 900;
const HEIGHT = 300;
const LEFT = 52;
const BARS = 46; // the height of the bars below the curves
const BOTTOM = 24;
const SHOWN_USED = 60; // of the past, about as many seconds
const PAST_SHARE = 0.4; // of the width

/**
 * The use of pages: what was, what had been forecast, and what is forecast.
 *
 * used: pairs of a step and pages; past: earlier forecasts; ahead: the present one.
 */
export function forecastChart({ used, past, ahead, pages }) {
  const now = ahead.step;
  const span = Math.max(ahead.all_pages.length * ahead.stride, 50);
  // Steps pass quickly where sequences are short: the past has a scale of its own.
  const first = used.length > 1 ? used.at(-Math.min(used.length, SHOWN_USED))[0] : now - span / 2;
  const last = now + span;
  const plotHeight = HEIGHT - BARS - BOTTOM - 10;
  const top = Math.max(ahead.limit, ...ahead.all_pages, ...used.map((each) => each[1]), 1);
  const middle = LEFT + (WIDTH - LEFT - 8) * PAST_SHARE;
  const x = (step) =>
    step < now
      ? LEFT + ((middle - LEFT) * (step - first)) / Math.max(1, now - first)
      : middle + ((WIDTH - 8 - middle) * (step - now)) / span;
  const y = (value) => 10 + plotHeight * (1 - value / top);
  const bins = (values, from) => values.map((value, index) => [from + index * ahead.stride, value]);
  const points = (pairs) => pairs.filter(([step]) => step >= first && step <= last).map(([step, value]) => [x(step), y(value)]);

  const chart = drawing("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  chart.setAttribute("aria-label", spoken(ahead, pages));
  for (const part of [0, 0.5, 1]) {
    const height = y(part * top);
    chart.append(
      drawing("line", { class: "axis", x1: LEFT, x2: WIDTH - 8, y1: height, y2: height }),
      drawing("text", { x: LEFT - 6, y: height + 4, "text-anchor": "end" }, Math.round(part * top)),
    );
  }
  chart.append(
    drawing("line", { class: "limit-line", x1: LEFT, x2: WIDTH - 8, y1: y(ahead.limit), y2: y(ahead.limit) }),
    drawing("line", { class: "present", x1: x(now), x2: x(now), y1: 10, y2: HEIGHT - BOTTOM }),
  );
  const running = points(bins(ahead.running_pages, now));
  if (running.length > 1) {
    const base = y(0);
    const area = [[running[0][0], base], ...running, [running.at(-1)[0], base]];
    chart.append(drawing("path", { class: "running", d: `${path(area)}Z` }));
  }
  for (const earlier of past) {
    const pairs = earlier.all_pages.map((value, index) => [earlier.step + index * earlier.stride, value]);
    chart.append(drawing("path", { class: "past", d: path(points(pairs)) }));
  }
  chart.append(drawing("path", { class: "used", d: path(points(used)) }));
  chart.append(drawing("path", { class: "all", d: path(points(bins(ahead.all_pages, now))) }));
  bars(chart, ahead, now, x);
  marks(chart, now, span, first, x, ahead.step_s);
  return chart;
}

function bars(chart, ahead, now, x) {
  const base = HEIGHT - BOTTOM - BARS / 2;
  const most = Math.max(1, ...ahead.num_admitted, ...ahead.num_ended);
  const width = Math.max(0.7, x(now + ahead.stride) - x(now) - 0.3);
  const unit = BARS / 2 - 4;
  ahead.num_admitted.forEach((number, index) => {
    if (!number) return;
    const height = Math.max(1, unit * (number / most));
    chart.append(drawing("rect", { class: "admitted", x: x(now + index * ahead.stride), y: base - height, width, height }));
  });
  ahead.num_ended.forEach((number, index) => {
    if (!number) return;
    const height = Math.max(1, unit * (number / most));
    chart.append(drawing("rect", { class: "ended", x: x(now + index * ahead.stride), y: base, width, height }));
  });
}

function marks(chart, now, span, first, x, stepSeconds) {
  const label = (step, text, anchor) =>
    chart.append(drawing("text", { x: x(step), y: HEIGHT - 8, "text-anchor": anchor }, text));
  label(now, "now", "middle");
  for (const part of [0.5, 1]) {
    const steps = Math.round(part * span);
    const time = stepSeconds ? `, ${(steps * stepSeconds).toPrecision(2)} s` : "";
    label(now + steps, `${steps} steps${time}`, part === 1 ? "end" : "middle");
  }
  if (now - first > 1) label(first, `${Math.round(now - first)} steps ago`, "start");
}

function spoken(ahead, pages) {
  const admitted = ahead.num_admitted.reduce((sum, each) => sum + each, 0);
  const steps = ahead.all_pages.length * ahead.stride;
  const peak = Math.max(0, ...ahead.all_pages);
  return (
    `Forecast of the KV cache's use over the next ${steps} steps: ${ahead.used} of ${pages} pages now,`
    + ` at most ${peak}; ${admitted} sequences of the queue begin`
  );
}

/** What the lines and bars of the forecast mean. */
export function legend() {
  const lines = [
    ["used", "pages in use until now"],
    ["all", "forecast, with the queue"],
    ["running", "forecast of what runs"],
    ["past", "earlier forecasts"],
    ["limit-line", "what admission may fill"],
    ["admitted", "sequences that begin"],
    ["ended", "sequences that end"],
  ];
  const items = lines.map(([kind, text]) => {
    const isBar = ["running", "admitted", "ended"].includes(kind);
    const shape = isBar
      ? drawing("rect", { class: kind, x: 0, y: 1, width: 24, height: 8 })
      : drawing("line", { class: kind, x1: 0, x2: 24, y1: 5, y2: 5 });
    return element("li", {}, drawing("svg", { class: "chart", viewBox: "0 0 24 10", "aria-hidden": "true" }, shape), text);
  });
  return element("ul", { class: "legend" }, ...items);
}
