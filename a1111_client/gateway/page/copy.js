// A job as something to paste elsewhere.

import { button, make, say } from "./dom.js";
import { endpointUrl } from "./form.js";

const PICTURE = "BASE64 OF A PICTURE";
const isPicture = (value) => typeof value === "string" && value.length > 20_000;

/** The job without its pictures: they are too long for a command line. */
const withoutPictures = (input) => JSON.parse(JSON.stringify(input, (_key, value) => (isPicture(value) ? PICTURE : value)));

const keyName = () => (/^https:\/\/api\.runpod\.ai\//.test(endpointUrl()) ? "RUNPOD_API_KEY" : "LOCAL_API_KEY");

const toJson = (input) => JSON.stringify({ input }, null, 2);

const toCurl = (input) => `curl "${endpointUrl()}/run" \\
  -H "Authorization: Bearer $${keyName()}" -H "Content-Type: application/json" --data-binary @- <<'JSON'
${toJson(withoutPictures(input))}
JSON
`;

function pythonLiteral(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value); // numbers, and texts: JSON's escapes are Python's too
  const isList = Array.isArray(value);
  const members = isList
    ? value.map((member) => inner + pythonLiteral(member, inner))
    : Object.entries(value).map(([name, member]) => `${inner}${JSON.stringify(name)}: ${pythonLiteral(member, inner)}`);
  return `${isList ? "[" : "{"}\n${members.join(",\n")},\n${indent}${isList ? "]" : "}"}`;
}

const toPython = (input) => `import os
import time

import httpx

job = ${pythonLiteral({ input: withoutPictures(input) })}
headers = {"Authorization": "Bearer " + os.environ.get("${keyName()}", "none")}
with httpx.Client(base_url="${endpointUrl()}/", headers=headers) as endpoint:
    answer = endpoint.post("run", json=job).raise_for_status().json()
    while answer["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        time.sleep(1)
        answer = endpoint.get("status/" + answer["id"]).raise_for_status().json()
print(answer["status"], answer.get("error") or answer["output"]["worker"])
`;

async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text }); // not over plain http on a network
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** The three buttons. `input` makes the job's input when one is pressed. */
export function copyButtons(input) {
  const kinds = { curl: toCurl, Python: toPython, JSON: toJson };
  return Object.entries(kinds).map(([kind, write]) => {
    const copy = button(kind, async () => {
      try {
        const text = write(input());
        await toClipboard(text);
        say(text.includes(PICTURE) ? `Copied. Put your picture in the place of "${PICTURE}".` : "Copied.");
      } catch {
        say("The browser does not let this page copy.");
      }
    });
    copy.setAttribute("aria-label", `Copy as ${kind}`);
    return copy;
  });
}
