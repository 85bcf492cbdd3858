// The open jobs, asked after twice a second, and those that failed.

import { ask } from "./api.js";
import { button, byId, make, say } from "./dom.js";

const PERIOD = 500; // ms
const PAUSE = 3000; // ms, after the gateway did not answer
const rows = new Map(); // id: the row that shows an open job
const ended = new Set(); // ids that have been dealt with
let timer = null;
let isAsking = false;
let isFirst = true;

/** Send a job. */
export async function send(input) {
  await ask("POST", "/page/jobs", { input });
  say("Sent.");
  await follow();
}

export const forget = (id) => ask("DELETE", `/page/jobs/${id}`).catch((error) => say(error.message));

let onDone = () => {};

/** Have this called with each job that has pictures. */
export const setOnDone = (callback) => { onDone = callback; };

/** Ask after the jobs until all have ended. */
export async function follow() {
  clearTimeout(timer);
  if (isAsking) {
    timer = setTimeout(follow, PERIOD);
    return;
  }
  isAsking = true;
  try {
    const jobs = await ask("GET", "/page/jobs");
    for (const job of jobs) {
      if (job.state === "open") showOpen(job);
      else if (!ended.has(job.id)) await end(job);
    }
    const ids = new Set(jobs.map(({ id }) => id));
    for (const id of rows.keys()) if (!ids.has(id)) drop(id); // another window has dealt with it
    byId("queue-empty").hidden = byId("queue").childElementCount > 0;
    document.title = rows.size ? `(${rows.size}) a1111` : "a1111";
    isFirst = false;
    if (rows.size) timer = setTimeout(follow, PERIOD);
  } catch (error) {
    say(error.message);
    timer = setTimeout(follow, PAUSE);
  } finally {
    isAsking = false;
  }
}

function drop(id) {
  rows.get(id)?.item.remove();
  rows.delete(id);
}

function showOpen(job) {
  const row = rows.get(job.id) ?? openRow(job);
  row.bar.value = job.progress;
  row.text.textContent = job.eta_s ? `${job.text}, ${Math.ceil(job.eta_s)} s left` : job.text;
  if (job.preview) {
    row.preview.src = `data:image/jpeg;base64,${job.preview}`;
    row.preview.hidden = false;
  }
}

function openRow(job) {
  const name = job.prompt || job.task;
  const bar = make("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", `Progress of ${name}`);
  const text = make("p");
  const preview = make("img", { alt: "Preview", hidden: true });
  const cancel = button("Cancel", () => {
    cancel.disabled = true;
    forget(job.id).then(follow);
  });
  cancel.setAttribute("aria-label", `Cancel ${name}`);
  const item = make("li", {}, make("p", { textContent: name }), bar, text, preview, cancel);
  byId("queue").append(item);
  const row = { item, bar, text, preview };
  rows.set(job.id, row);
  return row;
}

async function end(job) {
  const whole = await ask("GET", `/page/jobs/${job.id}`);
  ended.add(job.id);
  drop(job.id);
  if (whole.state === "failed") return showFailed(whole);
  if (whole.state === "cancelled") {
    forget(job.id);
    return say("Cancelled.");
  }
  if (!isFirst) say(`${whole.answer.images.length === 1 ? "The picture is" : "The pictures are"} there.`);
  return onDone(whole);
}

function showFailed({ id, prompt, task, error }) {
  const dismiss = button("Dismiss", () => {
    item.remove();
    byId("queue-empty").hidden = byId("queue").childElementCount > 0;
    forget(id);
  });
  const item = make("li", { className: "failed" },
    make("p", { textContent: prompt || task }),
    make("p", {}, make("strong", { textContent: error.code ?? "Failed" }), ` ${error.message}`),
    ...(error.hint ? [make("p", { textContent: `What to do: ${error.hint}` })] : []),
    dismiss);
  byId("queue").append(item);
  say(`The job failed: ${error.message}`);
}
