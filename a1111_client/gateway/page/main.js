// The page: the form sends jobs, the queue shows them, the gallery keeps their pictures.

import { copyButtons } from "./copy.js";
import { byId, say } from "./dom.js";
import { jobInput, loadModels, takeSettings, upscaleInput } from "./form.js";
import { showPictures } from "./gallery.js";
import { follow, forget, send, setOnDone } from "./queue.js";
import { startFrom } from "./start.js";

/** Do it, and say what went wrong. */
const attempt = (work) => (...values) => Promise.resolve(work(...values)).catch((error) => say(error.message));

const actions = {
  takeSettings: attempt(takeSettings),
  startFrom: attempt(startFrom),
  upscale: attempt((image) => send(upscaleInput(image))),
  forget,
};

setOnDone((job) => {
  showPictures(job, actions);
  attempt(loadModels)(); // the job may have brought new lists along
});

const form = byId("form");
form.onsubmit = (event) => {
  event.preventDefault();
  attempt(() => send(jobInput()))();
};
form.onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
};
byId("copy-form").append("Copy as", ...copyButtons(jobInput));
byId("settings-file").onchange = ({ target }) => { if (target.files[0]) actions.takeSettings(target.files[0]); };

const start = byId("start");
const pictureIn = (transfer) => [...(transfer?.files ?? [])].find(({ type }) => type.startsWith("image/"));
document.ondragover = (event) => {
  event.preventDefault();
  start.classList.toggle("over", start.contains(event.target));
};
document.ondragleave = () => start.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  start.classList.remove("over");
  const file = pictureIn(event.dataTransfer);
  if (!file) return say("Only pictures can be dropped here.");
  return start.contains(event.target) ? actions.startFrom(file) : actions.takeSettings(file);
};
document.onpaste = (event) => {
  const file = pictureIn(event.clipboardData);
  if (file) actions.startFrom(file);
};
document.onvisibilitychange = () => { if (!document.hidden) follow(); };

attempt(loadModels)();
follow();
