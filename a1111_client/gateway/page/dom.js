// Small helpers for elements.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const button = (text, onclick) => make("button", { type: "button", textContent: text, onclick });

/** Say it on the page, and to a screen reader. */
export function say(text) {
  byId("status").textContent = text;
}

/** Give a menu these texts, and keep what was chosen if it is still there. */
export function fill(select, texts, chosen) {
  const before = select.value || chosen;
  select.replaceChildren(...texts.map((text) => new Option(text)));
  select.value = texts.includes(before) ? before : (texts.includes(chosen) ? chosen : texts[0] ?? "");
}

/** The bytes of a file as base64. */
export function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** A picture of an answer, as a file. */
export function toBlob(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const kind = bytes[0] === 0xff ? "jpeg" : bytes[0] === 0x52 ? "webp" : "png";
  return new Blob([bytes], { type: `image/${kind}` });
}
