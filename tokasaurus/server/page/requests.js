// Requests in flight, and batches.

import { byId, count, duration, element, say } from "./elements.js";
import { ask, post, save } from "./engine.js";

const FINAL = ["completed", "failed", "expired", "cancelled"];
const rows = new Map(); // of both tables, by id

function cells(row, texts) {
  texts.forEach((text, index) => say(row.cells[index], text));
}

function emptyRow(count_) {
  return element("tr", {}, ...Array.from({ length: count_ }, () => element("td")));
}

/** Brings the rows of a table in line with these ids, and calls back for each. */
function arrange(table, ids, make, fill) {
  const body = byId(table).tBodies[0];
  const wanted = new Set(ids);
  for (const row of [...body.rows]) {
    if (wanted.has(row.dataset.id)) continue;
    rows.delete(row.dataset.id);
    row.remove();
  }
  ids.forEach((id, index) => {
    let row = rows.get(id);
    if (!row) {
      row = make(id);
      row.dataset.id = id;
      rows.set(id, row);
    }
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] || null);
    fill(row, index);
  });
}

async function attempt(button, action) {
  button.disabled = true;
  try {
    await action();
  } catch (error) {
    say(byId("upload-state"), error.message);
    button.disabled = false;
  }
}

export function showRequests(snapshot) {
  const { requests, batches, num_requests: total } = snapshot;
  const more = total > requests.length ? `, of which the oldest ${requests.length} are shown` : "";
  say(byId("num-requests"), `${total} ${total === 1 ? "prompt is" : "prompts are"} in flight${more}.`);
  arrange("request-table", requests.map((each) => each.id), requestRow, (row, index) => {
    const each = requests[index];
    cells(row, [
      each.id,
      each.client || "–",
      duration(each.age_s),
      String(each.samples),
      count(each.prompt_tokens),
      each.tokens ? `${count(each.tokens)} of ${count(each.max_tokens * each.samples)}` : `up to ${count(each.max_tokens * each.samples)}`,
      duration(each.eta_s),
      String(each.priority),
    ]);
  });
  arrange("batch-table", batches.map((each) => each.id), batchRow, (row, index) => fillBatch(row, batches[index], snapshot.time));
}

function requestRow(id) {
  const row = emptyRow(9);
  const button = element("button", { type: "button", "aria-label": `Cancel request ${id}` }, "Cancel");
  button.addEventListener("click", () => attempt(button, () => post(`v1/engine/requests/${encodeURIComponent(id)}/cancel`, {})));
  row.cells[8].append(button);
  return row;
}

function batchRow(id) {
  const row = emptyRow(7);
  const bar = element("progress", { max: 1, value: 0, "aria-label": `Progress of batch ${id}` });
  row.cells[2].append(bar, element("span"));
  const button = element("button", { type: "button", "aria-label": `Cancel batch ${id}` }, "Cancel");
  button.addEventListener("click", () => attempt(button, () => post(`v1/batches/${encodeURIComponent(id)}/cancel`, {})));
  row.cells[6].append(button);
  return row;
}

function fillBatch(row, batch, time) {
  const { total, completed, failed } = batch.request_counts;
  const done = completed + failed;
  const isOver = FINAL.includes(batch.status);
  say(row.cells[0], batch.id);
  say(row.cells[1], batch.status);
  const [bar, text] = row.cells[2].children;
  bar.value = total ? done / total : isOver ? 1 : 0;
  say(text, ` ${count(done)} of ${count(total)}`);
  let left = "–";
  if (!isOver && done && batch.in_progress_at) left = duration(((time - batch.in_progress_at) * (total - done)) / done);
  say(row.cells[3], left);
  say(row.cells[4], failed ? count(failed) : problems(batch));
  files(row.cells[5], batch);
  row.cells[6].firstChild.hidden = isOver;
}

function problems(batch) {
  const found = batch.errors && batch.errors.data;
  return found && found.length ? found[0].message : "0";
}

function files(cell, batch) {
  const found = [["output", batch.output_file_id], ["errors", batch.error_file_id]].filter((each) => each[1]);
  if (cell.childElementCount === found.length) return;
  cell.replaceChildren(
    ...found.map(([kind, id]) => {
      const name = `${batch.id}-${kind}.jsonl`;
      const button = element("button", { type: "button", "aria-label": `Download the ${kind} of batch ${batch.id}` }, kind);
      button.addEventListener("click", async () => {
        await attempt(button, () => save(`v1/files/${encodeURIComponent(id)}/content`, name));
        button.disabled = false;
      });
      return button;
    }),
  );
}

export function watchUpload() {
  byId("upload").addEventListener("submit", async (event) => {
    event.preventDefault();
    const [file] = byId("upload-file").files;
    const state = byId("upload-state");
    try {
      say(state, `uploading ${file.name}`);
      const form = new FormData();
      form.append("purpose", "batch");
      form.append("file", file);
      const stored = await (await ask("v1/files", { method: "POST", body: form })).json();
      const body = { input_file_id: stored.id, endpoint: byId("upload-endpoint").value, completion_window: "24h" };
      const batch = await (await post("v1/batches", body)).json();
      say(state, `batch ${batch.id} has begun`);
      byId("upload").reset();
    } catch (error) {
      say(state, error.message);
    }
  });
}
