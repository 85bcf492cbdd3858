// The form: what it says is a job's input.

import { ask } from "./api.js";
import { byId, fill, say, toBase64 } from "./dom.js";
import { chosenLoras, setLoras, showKnownLoras } from "./loras.js";
import { startFields } from "./start.js";

let models = null;

/** Ask for the lists and fill the menus. A choice stays. */
export async function loadModels() {
  models = await ask("GET", "/page/models");
  fill(byId("sampler"), models.samplers, "DPM++ 2M");
  fill(byId("scheduler"), models.schedulers, "Karras");
  fill(byId("checkpoint"), models.checkpoints, models.checkpoints[0]);
  fill(byId("upscaler"), models.upscalers.filter((name) => name !== "None"), "R-ESRGAN 4x+");
  byId("checkpoints").hidden = models.checkpoints.length < 2;
  if (models.limits.max_steps) byId("steps").max = models.limits.max_steps;
  if (models.limits.max_images) byId("count").max = models.limits.max_images;
  byId("lists").textContent = models.is_default
    ? "The endpoint's own lists are not known yet: the first job brings them."
    : `${models.checkpoints[0]}`;
  showKnownLoras(models);
}

export const endpointUrl = () => models?.endpoint ?? "";

/** The job's input. What is at its default is left out. */
export function jobInput() {
  const number = (id) => Number(byId(id).value);
  const given = {
    ...startFields(),
    prompt: byId("prompt").value,
    width: number("width"),
    height: number("height"),
    steps: number("steps"),
    cfg_scale: number("cfg"),
    sampler_name: byId("sampler").value,
    scheduler: byId("scheduler").value,
  };
  if (byId("negative").value.trim()) given.negative_prompt = byId("negative").value;
  if (number("seed") >= 0) given.seed = number("seed");
  if (number("count") > 1) given.n_iter = number("count");
  if (byId("checkpoint").selectedIndex > 0) given.checkpoint = byId("checkpoint").value;
  if (chosenLoras().length) given.loras = chosenLoras();
  if (byId("preview").checked) given.preview = true;
  return given;
}

/** The input of a job that enlarges a picture. */
export const upscaleInput = (image) => ({
  task: "upscale",
  image,
  upscaler_1: byId("upscaler").value,
  upscaling_resize: Number(byId("factor").value),
});

/** Take over the settings that are written inside a picture. */
export async function takeSettings(file) {
  const { info, parameters } = await ask("POST", "/sdapi/v1/png-info", { image: await toBase64(file) });
  if (!info) return say("This picture has no settings inside.");
  const loras = [];
  const prompt = parameters.Prompt.replace(/<lora:([^:>]+):([-\d.]+)[^>]*>/g, (_tag, name, scale) => {
    loras.push({ name, scale: Number(scale) });
    return "";
  });
  byId("prompt").value = prompt.replace(/^[\s,]+|[\s,]+$/g, "");
  byId("negative").value = parameters["Negative prompt"] ?? "";
  const fields = { steps: "Steps", cfg: "CFG scale", seed: "Seed", width: "Size-1", height: "Size-2" };
  for (const [id, name] of Object.entries(fields)) if (name in parameters) byId(id).value = parameters[name];
  chooseSampler(parameters.Sampler ?? "", parameters["Schedule type"] ?? "Automatic");
  setLoras(loras);
  say("The settings of the picture are taken.");
}

/** Versions before 1.9 write both in one: "DPM++ 2M Karras". */
function chooseSampler(sampler, scheduler) {
  const has = (id, name) => [...byId(id).options].some((option) => option.value === name);
  if (!has("sampler", sampler)) {
    const end = models.schedulers.find((name) => sampler.endsWith(` ${name}`));
    if (end) [sampler, scheduler] = [sampler.slice(0, -end.length - 1), end];
  }
  if (has("sampler", sampler)) byId("sampler").value = sampler;
  if (has("scheduler", scheduler)) byId("scheduler").value = scheduler;
}
