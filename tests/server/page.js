// Runs the page's script, which the command line names, on a stub of a browser: test_page.py.
"use strict";
const assert = require("node:assert");
const fs = require("node:fs");
const vm = require("node:vm");

function element(tag) {
  return {
    tag, value: "", textContent: "", hidden: false, disabled: false, width: 0, height: 0, children: [], drawn: [], dark: 0,
    classList: { add() {}, remove() {} },
    addEventListener() {},
    append(...more) { this.children.push(...more); },
    replaceChildren(...all) { this.children = all; },
    toDataURL() { return "data:,"; },
    getContext() {
      const canvas = this;
      return {
        drawImage(from) { canvas.drawn.push(from.picture); canvas.picture = from.picture; },
        fillRect() { canvas.dark += String(this.fillStyle).startsWith("rgba"); },
      };
    },
  };
}

function page() {
  const elements = {}, events = [];
  let more;
  const told = () => new Promise((resolve) => { more = resolve; });
  const world = {
    document: {
      createElement: element,
      getElementById: (id) => (elements[id] ??= element(id)),
      addEventListener() {},
    },
    createImageBitmap: async (file) => ({ ...file, picture: file.name }),
    TextDecoderStream: class {},
    AbortController, Option: class {}, setTimeout,
    fetched: [],
    props: { st3: null },
    async fetch(url) {
      world.fetched.push(url);
      if (url.startsWith("props")) return { json: async () => world.props };
      if (url === "v1/models") return { status: 200, json: async () => ({ data: [] }) };
      const read = async () => {
        if (!events.length) await told();
        const value = events.shift();
        return value === null ? { done: true } : { value: `data: ${JSON.stringify(value)}\n` };
      };
      return { status: 200, ok: true, body: { pipeThrough: () => ({ getReader: () => ({ read }) }) } };
    },
  };
  vm.runInNewContext(fs.readFileSync(process.argv[2], "utf8"), world);
  const answer = (...some) => { events.push(...some, null); more?.(); };
  return { world, $: world.document.getElementById, answer };
}

const later = () => new Promise((resolve) => setTimeout(resolve, 1));

// What is drawn of an answer about a picture of that size, whose last patch of each image is not read from layer 1 on.
async function drawn(width, height, ...images) {
  const { world, $, answer } = page();
  await world.take({ name: "first", width, height });
  const asking = world.ask();
  await later();
  answer({ st3: {
    images, given: 9, budget: 0.5, per_layer: [9, 8], cuts: [0], kv_bytes: { live: 1, full: 2 },
    layers: images.map(({ nx, ny }) => Array(nx * ny).fill(2).fill(1, nx * ny - 1)),
  } });
  await asking;
  assert.equal($("kept").hidden, false, $("note").textContent);
  assert.equal($("steps").children.length, 2);
  $("layer").value = 1;
  world.drawLayer();
  assert.ok($("view").children.every((canvas) => canvas.dark === 1));
  return { canvases: $("view").children, summary: $("summary").textContent };
}

async function main() {
  { // one square image: the picture lies in it
    const { canvases: [canvas, ...rest], summary } = await drawn(300, 100, { nx: 3, ny: 3 });
    assert.deepEqual([canvas.width, canvas.height, canvas.drawn.length, rest.length], [576, 576, 1, 0]);
    assert.ok(!summary.includes("tiles"));
  }
  { // an image in the picture's own shape
    const { canvases: [canvas] } = await drawn(400, 200, { nx: 8, ny: 4 });
    assert.deepEqual([canvas.width, canvas.height, canvas.drawn.length], [576, 288, 1]);
  }
  { // in another shape
    const { canvases: [canvas], summary } = await drawn(200, 400, { nx: 8, ny: 4 });
    assert.deepEqual([canvas.width, canvas.height, canvas.drawn.length], [576, 288, 0]);
    assert.ok(summary.includes("tiles"));
  }
  { // tiles
    const { canvases, summary } = await drawn(400, 200, { nx: 4, ny: 4 }, { nx: 4, ny: 2 });
    assert.deepEqual(canvases.map((c) => [c.width, c.height, c.drawn.length]), [[576, 576, 0], [576, 288, 0]]);
    assert.ok(summary.includes("tiles"));
  }
  { // a row
    const { canvases: [canvas] } = await drawn(100, 100, { nx: 500, ny: 1 });
    assert.deepEqual([canvas.width, canvas.height, canvas.drawn.length], [576, 8, 0]);
  }
  { // another picture and another try while an answer comes
    const { world, $, answer } = page();
    await world.take({ name: "first", width: 9, height: 9 });
    const asking = world.ask();
    await later();
    await world.take({ name: "second", width: 9, height: 9 });
    assert.equal($("ask").disabled, true);
    await world.ask();
    assert.equal(world.fetched.filter((url) => url.endsWith("completions")).length, 1);
    answer({ st3: { images: [{ nx: 1, ny: 1 }], layers: [[1]], given: 1, budget: 1, per_layer: [1], cuts: [],
      kv_bytes: { live: 1, full: 1 } } });
    await asking;
    assert.deepEqual($("view").children[0].drawn, ["first"]);
    assert.equal($("ask").disabled, false);
  }
  for (const [st3, said] of [[{ reason: "a model of mamba is not pruned" }, "mamba"], [null, "st3-edge serve"]]) {
    const { world, $, answer } = page();
    world.props.st3 = st3;
    await world.take({ name: "first", width: 9, height: 9 });
    const asking = world.ask();
    await later();
    answer({ choices: [{ delta: { content: "A star." } }] });
    await asking;
    assert.equal($("answer").textContent, "A star.");
    assert.ok($("note").textContent.includes(said), $("note").textContent);
  }
}

main().catch((error) => { console.error(error); process.exit(1); });
