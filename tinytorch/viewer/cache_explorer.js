// The page of CacheExplorer, as an anywidget module: render({model, el}) draws model.get("recording") into el.
// Colours are Okabe and Ito's, which colour-blind readers tell apart; every state also has a mark of its own.

const COLOURS = { empty: "#ffffff", cached: "#cfe3f3", read: "#56b4e9", written: "#e69f00", ink: "#1a1a1a" };
const STYLE = `
.kv { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; background: #fff; }
.kv h1 { font-size: 1.3rem; margin: 0 0 .4rem; } .kv h2 { font-size: 1rem; margin: 1.1rem 0 .3rem; }
.kv .controls { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; }
.kv input[type=range] { flex: 1; min-width: 12rem; } .kv button, .kv select { font: inherit; padding: .15rem .6rem; }
.kv :focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
.kv .tokens { line-height: 2; word-break: break-word; }
.kv .token { padding: .1rem .15rem; border: 1px solid #bbb; border-radius: 3px; margin-right: 2px; white-space: pre; }
.kv .token.later { visibility: hidden; } .kv .token.cached { background: #cfe3f3; }
.kv .token.run { background: #e69f00; font-weight: 600; } .kv .token.next { border: 2px dashed #1a1a1a; }
.kv table { border-collapse: collapse; } .kv td, .kv th { text-align: right; padding: .1rem .9rem .1rem 0; }
.kv th:first-child, .kv td:first-child { text-align: left; font-weight: 400; }
.kv svg { display: block; max-width: 100%; height: auto; } .kv .legend span { margin-right: 1.2rem; }
.kv .key { display: inline-block; width: 1em; height: 1em; border: 1px solid #555; text-align: center;
           font-size: .75em; line-height: 1em; margin-right: .35em; }
`;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "title", "line"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const number = (value) => Math.round(value).toLocaleString("en-US");

function stateOf(step, layer, head, kvHead, slot) {
  if (step.written[layer][kvHead].includes(slot)) return "written";
  if (slot >= step.tokens_cached) return "empty";
  return step.weights[layer][head][slot] >= 0 ? "read" : "cached";
}

const MARKS = { empty: "", cached: "\u00b7", read: "r", written: "W" };

function drawSlots(recording, step, layer) {
  const heads = recording.num_heads, shared = heads / recording.num_kv_heads;
  const slots = Math.min(recording.max_seq_len, recording.tokens.length);
  const size = Math.max(7, Math.min(22, Math.floor(860 / slots))), left = 64;
  const svg = make("svg", { width: left + slots * size, height: heads * (size + 4) + 4, role: "img",
    "aria-label": `Slots of layer ${layer}: ${step.tokens_cached} hold a token` });
  for (let head = 0; head < heads; head++) {
    const y = head * (size + 4) + 2, kvHead = Math.floor(head / shared);
    svg.append(make("text", { x: 0, y: y + size - 3, "font-size": 12, fill: COLOURS.ink }, `head ${head}`));
    for (let slot = 0; slot < slots; slot++) {
      const state = stateOf(step, layer, head, kvHead, slot);
      const box = make("rect", { x: left + slot * size, y, width: size - 1, height: size, fill: COLOURS[state],
        stroke: "#777", "stroke-width": 0.6, "data-state": state });
      box.append(make("title", {}, `slot ${slot}: ${state}`));
      svg.append(box);
      if (size >= 10 && MARKS[state]) {
        svg.append(make("text", { x: left + slot * size + (size - 1) / 2, y: y + size - 3, "font-size": size - 4,
          "text-anchor": "middle", fill: COLOURS.ink, "pointer-events": "none" }, MARKS[state]));
      }
    }
  }
  return svg;
}

function drawWeights(recording, step, layer, head) {
  const weights = step.weights[layer][head], height = 110, left = 64;
  const size = Math.max(7, Math.min(22, Math.floor(860 / recording.tokens.length)));
  const svg = make("svg", { width: left + recording.tokens.length * size, height: height + 18, role: "img",
    "aria-label": `Attention weights of layer ${layer}, head ${head}, over ${weights.length} positions` });
  for (const part of [0, 0.5, 1]) {
    const y = height - part * (height - 12);
    svg.append(make("line", { x1: left - 4, x2: left + recording.tokens.length * size, y1: y, y2: y, stroke: "#ddd" }));
    svg.append(make("text", { x: 30, y: y + 4, "font-size": 11, fill: COLOURS.ink }, part.toFixed(1)));
  }
  weights.forEach((weight, slot) => {
    const tall = Math.max(0, weight) * (height - 12);
    const bar = make("rect", { x: left + slot * size, y: height - tall, width: size - 1, height: tall, fill: "#0072b2" });
    bar.append(make("title", {}, `${JSON.stringify(recording.tokens[slot])} at position ${slot}: ${weight}`));
    svg.append(bar);
  });
  return svg;
}

function drawTokens(recording, step, index, node) {
  node.replaceChildren(...recording.tokens.map((text, place) => {
    const first = step.tokens_cached - step.rows;
    let kind = place < first ? "cached" : place < step.tokens_cached ? "run" : "later";
    if (place === step.tokens_cached) kind = "next";
    return make("span", { class: `token ${kind}`, title: `position ${place}` }, text.replace(/\n/g, "\u21b5"));
  }));
}

function totals(recording, index, name) {
  return recording.steps.slice(0, index + 1).reduce((sum, step) => sum + step[name], 0);
}

function drawNumbers(recording, index, layer, node) {
  const step = recording.steps[index];
  const read = step.weights[layer][0].filter((weight) => weight >= 0).length;
  const rows = [
    ["token rows run in this step", "rows", step.rows],
    ["tokens in the cache", "tokens-cached", step.tokens_cached],
    ["slots written per head", "slots-written", step.written[layer][0].length],
    ["slots read per head", "slots-read", read],
    ["bytes in use", "bytes-used", step.used_bytes],
    ["bytes allocated", "bytes-allocated", recording.allocated_bytes],
    ["multiplications, this step, with the cache", "mult-with", step.multiplications],
    ["multiplications, this step, without", "mult-without", step.multiplications_without],
    ["multiplications so far, with the cache", "mult-with-total", totals(recording, index, "multiplications")],
    ["multiplications so far, without", "mult-without-total", totals(recording, index, "multiplications_without")],
  ];
  node.replaceChildren(...rows.map(([label, id, value]) =>
    make("tr", {}, make("td", {}, label), make("td", { id: `kv-${id}`, "data-value": value }, number(value)))));
}

function choices(label, id, count) {
  const select = make("select", { id, "aria-label": label });
  for (let n = 0; n < count; n++) select.append(make("option", { value: n }, `${label} ${n}`));
  return select;
}

function render({ model, el }) {
  const recording = model.get("recording"), last = recording.steps.length - 1;
  const slider = make("input", { type: "range", id: "kv-step", min: 0, max: last, value: 0, "aria-label": "Step" });
  const back = make("button", { type: "button", id: "kv-back" }, "Back");
  const next = make("button", { type: "button", id: "kv-next" }, "Next");
  const said = make("span", { id: "kv-said", "aria-live": "polite" });
  const layer = choices("layer", "kv-layer", recording.num_layers);
  const head = choices("head", "kv-head", recording.num_heads);
  const tokens = make("div", { class: "tokens" }), slots = make("div"), weights = make("div"), numbers = make("tbody");
  const legend = make("p", { class: "legend" }, ...Object.keys(MARKS).map((state) => {
    const key = make("span", { class: "key", style: `background:${COLOURS[state]}` }, MARKS[state]);
    const words = { empty: "empty", cached: "holds a token, not read", read: "read", written: "written, then read" };
    return make("span", {}, key, words[state]);
  }));
  el.replaceChildren(make("section", { class: "kv" }, make("style", {}, STYLE),
    make("h1", {}, "The KV cache, step by step"),
    make("div", { class: "controls" }, back, slider, next, said), make("h2", {}, "Text"), tokens,
    make("h2", {}, "Slots of one layer"), make("div", { class: "controls" }, layer, head), legend, slots,
    make("h2", {}, "Attention weights of the newest token over the cached positions"), weights,
    make("h2", {}, "Numbers"), make("table", {}, numbers)));

  function show() {
    const index = Number(slider.value), step = recording.steps[index];
    said.textContent = `step ${index} of ${last}: ` + (index ? "one token" : "the prompt");
    back.disabled = index === 0;
    next.disabled = index === last;
    drawTokens(recording, step, index, tokens);
    slots.replaceChildren(drawSlots(recording, step, Number(layer.value)));
    weights.replaceChildren(drawWeights(recording, step, Number(layer.value), Number(head.value)));
    drawNumbers(recording, index, Number(layer.value), numbers);
  }
  const move = (by) => { slider.value = Number(slider.value) + by; show(); };
  const keys = { ArrowRight: 1, ArrowUp: 1, PageUp: 5, End: last, ArrowLeft: -1, ArrowDown: -1, PageDown: -5, Home: -last };
  slider.addEventListener("keydown", (event) => {  // by ourselves: a notebook keeps arrow keys from a slider
    if (!(event.key in keys)) return;
    event.preventDefault();
    event.stopPropagation();
    move(keys[event.key]);
  });
  back.addEventListener("click", () => move(-1));
  next.addEventListener("click", () => move(1));
  for (const control of [slider, layer, head]) control.addEventListener("input", show);
  show();
}

export default { render };
