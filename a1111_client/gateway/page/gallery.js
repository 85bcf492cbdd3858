// The pictures of this session, with what the worker told about them.

import { copyButtons } from "./copy.js";
import { button, byId, make, toBlob } from "./dom.js";

/** Show the pictures of an ended job, the newest first. `actions` are takeSettings, startFrom, upscale and forget. */
export function showPictures(job, actions) {
  const cards = job.answer.images.map((image, number) => makeCard(job, image, number, actions));
  byId("gallery").prepend(...cards);
}

function makeCard(job, image, number, { takeSettings, startFrom, upscale, forget }) {
  const worker = job.answer.worker ?? {};
  const blob = toBlob(image);
  const url = URL.createObjectURL(blob);
  const told = worker.pictures?.[number] ?? {};
  const seed = told.seed ?? worker.seeds?.[number] ?? null;
  const name = `${seed ?? job.id}.${blob.type.slice(6)}`;
  const title = job.task === "upscale" ? "An upscaled picture" : job.prompt || "A picture";
  const picture = make("a", { href: url, target: "_blank" },
    make("img", { src: url, alt: `${title}${seed === null ? "" : `, seed ${seed}`}` }));
  const line = (text, className = "") => make("p", { textContent: text, className });
  const facts = [
    [seed === null ? "" : `Seed ${seed}`, told.width ? `${told.width} × ${told.height}` : ""].filter(Boolean).join(", "),
    times(worker.timings ?? {}),
    job.gpu_seconds === null ? "" : `${job.gpu_seconds.toFixed(1)} GPU seconds, by RunPod's execution time`,
    ...proofs(worker),
  ].filter(Boolean);
  const card = make("li", {}, picture, ...facts.map((text) => line(text)),
    ...(worker.warnings ?? []).map((text) => line(`Warning: ${text}`, "warning")),
    make("div", { className: "row" },
      make("a", { href: url, download: name, textContent: "Save" }),
      button("Upscale", () => upscale(image)),
      button("Start from it", () => startFrom(blob)),
      button("Take its settings", () => takeSettings(blob)),
      button("Remove", () => {
        card.remove();
        URL.revokeObjectURL(url);
        if (!document.querySelector(`[data-job="${job.id}"]`)) forget(job.id);
      })),
    make("div", { className: "row" }, "Copy as", ...copyButtons(() => job.input)));
  card.dataset.job = job.id;
  return card;
}

/** Where the seconds went: "12.3 s: models 4.0, generate 8.1". */
function times({ total, ...stages }) {
  if (total === undefined) return "";
  const parts = Object.entries(stages).filter(([, seconds]) => seconds >= 0.05).map(([stage, seconds]) => `${stage} ${seconds.toFixed(1)}`);
  return `${total.toFixed(1)} s${parts.length ? `: ${parts.join(", ")}` : ""}`;
}

/** What the worker has verified: the checkpoint's hash, and each LoRA that the WebUI has read. */
function proofs({ checkpoint, loras }) {
  const told = checkpoint ? [`Checkpoint ${checkpoint.name}${checkpoint.sha256 ? `, SHA-256 ${checkpoint.sha256.slice(0, 10)}…` : ""}`] : [];
  for (const lora of loras ?? []) {
    const fits = lora.matched ? `, ${lora.matched[0]} of ${lora.matched[1]} layers fit` : "";
    told.push(`LoRA ${lora.name} at ${lora.scale}: ${lora.loaded ? "verified" : "not used"}${fits}`);
  }
  return told;
}
