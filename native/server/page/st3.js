"use strict";
// Sends a picture and a question to this server, and draws which patches each layer read, from the answer's "st3".

const MAX_SIDE = 2048; // of the picture that is sent; LLaVA looks at a few hundred pixels
const GROUND = "rgb(122, 116, 104)"; // what LLaVA's encoder pads a picture with
const $ = (id) => document.getElementById(id);
let st3 = null; // of the last answer
let asked = null; // the picture that it is about: another may have been taken since
let stop = null; // while an answer is on its way

function show(text) {
  $("note").textContent = text;
}

async function take(file) {
  if (!file) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    show("This file is no picture that the browser can read.");
    return;
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = $("picture");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.hidden = false;
  $("hint").hidden = true;
  $("ask").disabled = Boolean(stop);
  show("");
}

function copy(canvas) {
  const made = document.createElement("canvas");
  made.width = canvas.width;
  made.height = canvas.height;
  made.getContext("2d").drawImage(canvas, 0, 0);
  return made;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
      if (line.startsWith("error: ")) throw new Error(JSON.parse(line.slice(7)).message);
    }
  }
}

async function ask() {
  if (stop) return;
  stop = new AbortController();
  asked = copy($("picture"));
  $("answer").textContent = "";
  $("kept").hidden = true;
  $("ask").disabled = true;
  $("stop").hidden = false;
  show("");
  st3 = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: stop.signal,
      body: JSON.stringify({
        model: $("model").value || undefined,
        stream: true,
        temperature: 0,
        messages: [{
          role: "user",
          content: [
            { type: "image_url", image_url: { url: asked.toDataURL("image/png") } },
            { type: "text", text: $("question").value },
          ],
        }],
      }),
    });
    if (response.status === 401) $("key-row").hidden = false;
    if (!response.ok) {
      const text = await response.text();
      let message = text;
      try { message = JSON.parse(text).error.message; } catch { /* not JSON */ }
      throw new Error(message || `HTTP ${response.status}`);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      $("answer").textContent += event.choices?.[0]?.delta?.content ?? "";
      st3 = event.st3 ?? st3;
    }
    await report();
  } catch (error) {
    show(error.name === "AbortError" ? "Stopped." : String(error.message || error));
  } finally {
    stop = null;
    $("ask").disabled = false;
    $("stop").hidden = true;
  }
}

async function whyOff() {
  let reason;
  try {
    const url = $("model").value ? `props?model=${encodeURIComponent($("model").value)}` : "props";
    reason = (await (await fetch(url, { headers: headers(), signal: stop.signal })).json()).st3?.reason;
  } catch { /* it does not say */ }
  return reason ? `ST3 is off: ${reason}.` :
    "This server has ST3 off: start it with st3-edge serve, or with --override-kv st3.preset=str:st3.";
}

async function report() {
  if (!st3) {
    show(await whyOff());
    return;
  }
  if (!st3.layers) {
    show(`Nothing was dropped between the layers (${st3.mode}${st3.reason ? `: ${st3.reason}` : ""}).`);
    return;
  }
  const given = st3.given, n = st3.per_layer.length;
  $("summary").textContent = `${given} visual tokens; ${Math.round(100 * st3.budget)} % of them kept, over the layers ` +
    `on average. KV cache in use: ${(st3.kv_bytes.live / 1e6).toFixed(2)} MB, ` +
    `${(st3.kv_bytes.full / 1e6).toFixed(2)} MB without ST3.` +
    (whole() ? "" : " The encoder took the picture in tiles, or in another shape: below are their patches alone.");
  $("layer").max = n - 1;
  $("layer").value = n - 1;
  $("kept").hidden = false;
  const starts = [0, ...st3.cuts.map((cut) => cut + 1)];
  $("steps").replaceChildren(...starts.map((layer) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = `from layer ${layer}: ${st3.per_layer[layer]}`;
    figure.append(...drawn(192, layer), caption);
    return figure;
  }));
  drawLayer();
}

function drawLayer() {
  const layer = Number($("layer").value);
  $("at").textContent = `${layer} of 0 to ${st3.per_layer.length - 1}: reads ${st3.per_layer[layer]} of ${st3.given}`;
  $("view").replaceChildren(...drawn(576, layer));
}

// A canvas for each image of the answer, of that many pixels at its longer side, in the shape of its grid.
function drawn(side, layer) {
  return st3.images.map(({ nx, ny }, k) => {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(8, Math.round(side * Math.min(1, nx / ny)));
    canvas.height = Math.max(8, Math.round(side * Math.min(1, ny / nx))); // a family without a grid has one row
    draw(canvas, nx, ny, st3.layers[k] ?? [], layer);
    return canvas;
  });
}

// Whether one image is all of the picture: in the middle of a square, or in the picture's own shape, but for the rounding
// to whole patches.
function whole() {
  const { nx, ny } = st3.images[0], aspect = asked.width / asked.height;
  return st3.images.length === 1 && (nx === ny || Math.abs(aspect * ny - nx) <= aspect + 1);
}

// The picture as the encoder sees it, patches that the layer does not read darkened. Of tiles, whose place is not known,
// the patches alone.
function draw(canvas, nx, ny, layers, layer) {
  const context = canvas.getContext("2d"), w = canvas.width, h = canvas.height;
  context.fillStyle = GROUND;
  context.fillRect(0, 0, w, h);
  if (whole()) {
    const scale = Math.min(w / asked.width, h / asked.height);
    const [pw, ph] = nx === ny ? [asked.width * scale, asked.height * scale] : [w, h];
    context.drawImage(asked, (w - pw) / 2, (h - ph) / 2, pw, ph);
  }
  context.fillStyle = "rgba(0, 0, 0, 0.78)";
  for (let i = 0; i < layers.length; i++) {
    if (layers[i] > layer) continue;
    const x = i % nx, y = Math.floor(i / nx);
    context.fillRect(x * w / nx, y * h / ny, w / nx, h / ny);
  }
}

async function models() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) $("key-row").hidden = false;
    const list = (await response.json()).data ?? [];
    $("model").replaceChildren(...list.map(({ id }) => new Option(id, id)));
    $("model-row").hidden = list.length < 2;
  } catch { /* asked again by nobody: a server with one model needs no name */ }
}

$("file").addEventListener("change", (event) => take(event.target.files[0]));
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("stop").addEventListener("click", () => stop?.abort());
$("layer").addEventListener("input", drawLayer);
$("key").addEventListener("change", models);
models();
