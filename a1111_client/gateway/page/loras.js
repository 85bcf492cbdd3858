// The LoRAs of the job: one slider each.

import { button, byId, make, say } from "./dom.js";

const MOST = 16;
const rows = []; // {reference, scale}
let known = [];

/** Offer the LoRAs of the catalog and of the endpoint's cache. */
export function showKnownLoras(models) {
  const stem = (file) => file.replace(/\.[^.]*$/, "");
  const entry = ({ name, file, tag, version_id, scale }) => ({
    title: name || tag || stem(file),
    reference: version_id ? { version_id } : { name: tag || stem(file) },
    scale: scale ?? 1,
  });
  const catalog = models.catalog.map(entry);
  const ids = new Set(models.catalog.map(({ version_id }) => version_id));
  const cached = models.cached.filter(({ version_id }) => !version_id || !ids.has(version_id)).map(entry);
  known = [...catalog, ...cached];
  const group = (label, entries, first) => make("optgroup", { label },
    ...entries.map(({ title }, number) => new Option(title, first + number)));
  byId("known-lora").replaceChildren(new Option("Choose one to add it", ""),
    ...(catalog.length ? [group("Catalog", catalog, 0)] : []),
    ...(cached.length ? [group("Cached", cached, catalog.length)] : []));
}

/** What the job's field `loras` takes. */
export const chosenLoras = () => rows.map(({ reference, scale }) => ({ ...reference, scale }));

/** Have exactly these: those of a picture whose settings are taken. */
export function setLoras(loras) {
  rows.length = 0;
  byId("loras").replaceChildren();
  loras.forEach(({ name, scale }) => add({ title: name, reference: { name }, scale }));
}

function add({ title, reference, scale }) {
  const same = JSON.stringify(reference);
  if (rows.some((row) => JSON.stringify(row.reference) === same)) return say(`${title} is there already.`);
  if (rows.length === MOST) return say(`A job takes at most ${MOST} LoRAs.`);
  const row = { reference, scale };
  const shown = make("output", { textContent: scale });
  const reach = Math.max(4, Math.abs(scale));
  const slider = make("input", { type: "range", min: -reach, max: reach, step: 0.05, value: scale });
  slider.setAttribute("aria-label", `Weight of ${title}`);
  slider.oninput = () => {
    row.scale = Number(slider.value);
    shown.textContent = slider.value;
  };
  const remove = button("Remove", () => {
    rows.splice(rows.indexOf(row), 1);
    item.remove();
    byId("known-lora").focus();
  });
  remove.setAttribute("aria-label", `Remove ${title}`);
  const item = make("li", {}, make("div", { className: "row" }, make("span", { textContent: title }), shown, remove), slider);
  rows.push(row);
  byId("loras").append(item);
}

/** A reference as it was typed: a version id, a URL (or AIR, hf:…), or a name. */
function toReference(text) {
  if (/^\d+$/.test(text)) return { version_id: Number(text) };
  return text.includes(":") ? { url: text } : { name: text };
}

function addTyped() {
  const field = byId("other-lora");
  const text = field.value.trim();
  if (!text) return;
  add({ title: text, reference: toReference(text), scale: 1 });
  field.value = "";
}

byId("known-lora").onchange = ({ target }) => {
  if (target.value !== "") add(known[Number(target.value)]);
  target.value = "";
};
byId("add-lora").onclick = addTyped;
byId("other-lora").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  addTyped();
};
