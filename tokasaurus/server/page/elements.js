// Makes elements. Whatever comes from the engine becomes text, and never markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; children that are no nodes become text. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function drawing(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children) node.append(child instanceof Node ? child : String(child));
  return node;
}

/** Sets a text only where it changes, so that screen readers do not read it again. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A number with three digits: 7, 950, 12.3k. */
export function count(number) {
  if (number === null || number === undefined) return "–";
  if (number < 10) return String(Math.round(number * 10) / 10);
  for (const unit of ["", "k", "M", "G", "T"]) {
    if (number < 999.5) return Number(number.toPrecision(3)) + unit;
    number /= 1000;
  }
  return "many";
}

export const share = (number) => `${Math.round(number * 100)}%`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}
