// The picture that a job starts from, and the mask that is painted on it.

import { byId, say, toBase64 } from "./dom.js";

const picture = byId("start-picture");
const mask = byId("mask");
const cursor = byId("cursor");
const paint = mask.getContext("2d");
let base64 = "";
let isPainted = false;
let last = null; // where the brush was, in the picture's pixels
let at = { x: 0, y: 0 }; // where the keyboard's brush is

/** Start from this file. */
export async function startFrom(file) {
  const url = URL.createObjectURL(file);
  try {
    picture.src = url;
    await picture.decode();
  } catch {
    URL.revokeObjectURL(url);
    clear();
    say("This is no picture that the browser can show.");
    return;
  }
  base64 = await toBase64(file);
  mask.width = picture.naturalWidth;
  mask.height = picture.naturalHeight;
  at = { x: mask.width / 2, y: mask.height / 2 };
  isPainted = false;
  byId("painting").hidden = false;
  fitSize();
  say("The next job starts from this picture.");
}

/** The fields of img2img; nothing without a picture. */
export function startFields() {
  if (!base64) return {};
  const fields = { task: "img2img", init_images: [base64], denoising_strength: Number(byId("strength").value) };
  return isPainted ? { ...fields, mask: exportMask() } : fields;
}

/** Width and height as the picture has them, within what an SDXL checkpoint draws well. */
function fitSize() {
  const share = Math.min(1, Math.sqrt((1024 * 1024) / (mask.width * mask.height)));
  const side = (pixels) => Math.min(2048, Math.max(64, Math.round((pixels * share) / 8) * 8));
  byId("width").value = side(mask.width);
  byId("height").value = side(mask.height);
}

function exportMask() {
  const whole = document.createElement("canvas");
  whole.width = mask.width;
  whole.height = mask.height;
  const context = whole.getContext("2d");
  context.fillRect(0, 0, whole.width, whole.height); // black: stays
  context.drawImage(mask, 0, 0);
  return whole.toDataURL("image/png").split(",")[1];
}

function clear() {
  URL.revokeObjectURL(picture.src);
  picture.removeAttribute("src");
  base64 = "";
  isPainted = false;
  byId("painting").hidden = true;
  byId("start-file").value = "";
}

const scale = () => mask.width / mask.clientWidth; // the picture's pixels for one of the screen
const brush = () => Number(byId("brush").value) * scale();

function stroke(from, to) {
  paint.strokeStyle = paint.fillStyle = "#fff";
  paint.lineCap = "round";
  paint.lineWidth = brush();
  paint.beginPath();
  paint.moveTo(from.x, from.y);
  paint.lineTo(to.x, to.y);
  paint.stroke();
  paint.beginPath(); // a stroke without length paints nothing
  paint.arc(to.x, to.y, brush() / 2, 0, 2 * Math.PI);
  paint.fill();
  isPainted = true;
}

const pointOf = (event) => ({ x: event.offsetX * scale(), y: event.offsetY * scale() });

mask.onpointerdown = (event) => {
  mask.setPointerCapture(event.pointerId);
  last = pointOf(event);
  stroke(last, last);
};
mask.onpointermove = (event) => {
  if (!last) return;
  const point = pointOf(event);
  stroke(last, point);
  last = point;
};
mask.onpointerup = mask.onpointercancel = () => { last = null; };

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function showCursor() {
  cursor.hidden = false;
  const size = `${byId("brush").value}px`;
  Object.assign(cursor.style, { left: `${at.x / scale()}px`, top: `${at.y / scale()}px`, width: size, height: size });
}

mask.onkeydown = (event) => {
  const move = MOVES[event.key];
  if (move) {
    const step = brush() / 2;
    at = {
      x: Math.min(mask.width, Math.max(0, at.x + move[0] * step)),
      y: Math.min(mask.height, Math.max(0, at.y + move[1] * step)),
    };
  } else if (event.key === " ") {
    stroke(at, at);
  } else {
    return;
  }
  event.preventDefault();
  showCursor();
};
mask.onblur = () => { cursor.hidden = true; };

byId("clear-mask").onclick = () => {
  paint.clearRect(0, 0, mask.width, mask.height);
  isPainted = false;
};
byId("remove-picture").onclick = () => {
  clear();
  byId("start-file").focus();
};
byId("start-file").onchange = ({ target }) => { if (target.files[0]) startFrom(target.files[0]); };
byId("strength").oninput = ({ target }) => { byId("strength-value").textContent = target.value; };
