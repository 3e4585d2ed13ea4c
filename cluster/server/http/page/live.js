"use strict";
// Draws what /live/data/state and /live/data/samples say. Everything from the server goes in as text.

const KEPT = 900;
const RETRY_MS = 2000;
const $ = (id) => document.getElementById(id);
let facts = null;
let history = [];
let now = {};

// Reading --------------------------------------------------------------------------------------

const token = () => sessionStorage.getItem("token");
const headers = () => (token() ? { Authorization: `Bearer ${token()}` } : {});

async function follow() {
  for (;;) {
    try {
      const first = await fetch("/live/data/state", { headers: headers() });
      if (first.status === 401) return askForToken();
      if (!first.ok) throw new Error(`the server answered ${first.status}`);
      facts = await first.json();
      history = facts.history;
      now = facts.now;
      draw();
      await readSamples();
      setState("connection lost", false);
    } catch (error) {
      setState(`no connection: ${error.message}`, false);
    }
    await new Promise((wake) => setTimeout(wake, RETRY_MS));
  }
}

async function readSamples() {
  const answer = await fetch("/live/data/samples", { headers: headers() });
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((text) => text.trim())) {
      const news = JSON.parse(line);
      history.push(news.sample);
      now = news.now;
    }
    history.splice(0, Math.max(0, history.length - KEPT));
    if (!document.hidden) draw();
  }
}

function askForToken() {
  $("main").hidden = true;
  $("login").hidden = false;
  $("refused").textContent = token() ? "That token is not accepted." : "";
  setState("token needed", false);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  $("login").hidden = true;
  follow();
});
document.addEventListener("visibilitychange", () => facts && !document.hidden && draw());
addEventListener("resize", () => facts && draw());

// Words and numbers ----------------------------------------------------------------------------

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function bytes(value) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${value.toFixed(value < 10 && unit ? 1 : 0)} ${units[unit]}`;
}

const ago = (seconds) => (seconds < 60 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

function setState(text, good) {
  $("state").textContent = text;
  $("state").className = good ? "badge good" : "badge";
}

// Everything -----------------------------------------------------------------------------------

function draw() {
  $("login").hidden = true;
  $("main").hidden = false;
  document.title = `${facts.model} · expertmesh`;
  $("model").textContent = facts.model;
  $("layout").textContent =
    `${facts.num_nodes} x ${facts.ranks_per_node} ranks, TP ${facts.tensor_parallel_size}, up ${ago(now.uptime_s)}`;
  setState(now.state, now.state === "ready");
  drawTiles();
  chart($("throughput"), [line("tokens_per_s", "one", "generated"), line("prompt_tokens_per_s", "two", "prompts")]);
  chart($("balance"), [line("balancedness", "one", "mean"), line("balancedness_min", "two", "worst layer")], { top: 1, marks: true, digits: 2 });
  chart($("traffic"), [line("intra_node_bytes_per_s", "one", "inside nodes"), line("inter_node_bytes_per_s", "two", "between nodes")], { unit: (v) => `${bytes(v)}/s` });
  chart($("queue"), [line("running", "one", "running"), line("waiting", "two", "waiting")]);
  drawHeat();
  drawTables();
}

function drawTiles() {
  const last = history.at(-1) ?? {};
  const tiles = [
    ["tokens / s", number(last.tokens_per_s, last.tokens_per_s < 10 ? 1 : 0)],
    ["running", number(last.running)],
    ["waiting", number(last.waiting)],
    ["KV cache in use", number(100 * (last.kv_usage ?? 0)), "%"],
    ["to the first token", number(last.ttft_ms), "ms"],
    ["between tokens", number(last.tpot_ms), "ms"],
    ["balancedness", number(last.balancedness, 3)],
    ["refused / s", number(last.refused_per_s, last.refused_per_s ? 1 : 0)],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value, unit]) => {
    const tile = element("div", "", "tile");
    const shown = element("p", value, "value");
    if (unit) shown.append(element("small", unit));
    tile.append(element("p", name, "name"), shown);
    return tile;
  }));
}

// Charts over time -----------------------------------------------------------------------------

const line = (key, style, label) => ({ values: history.map((sample) => sample[key] ?? null), style, label });

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function niceTop(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function chart(canvas, lines, { top, marks = false, digits = 0, unit } = {}) {
  const width = canvas.clientWidth || 560, height = 170;
  const left = 62, right = 10, above = 16, below = 22;
  const most = top ?? niceTop(Math.max(0, ...lines.flatMap((each) => each.values.map((v) => v ?? 0))));
  const span = Math.max(60, history.length - 1);
  const x = (i) => left + ((width - left - right) * (span - (history.length - 1) + i)) / span;
  const y = (value) => above + (height - above - below) * (1 - value / most);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = y(share * most);
    parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
    const label = unit ? unit(share * most) : number(share * most, most < 2 ? Math.max(1, digits) : digits);
    parts.push(svg("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, label));
  }
  for (const share of [0, 0.5, 1]) {
    const anchor = share === 1 ? "end" : share ? "middle" : "start";
    const text = share === 1 ? "now" : `-${ago(span * (1 - share) * facts.sample_s)}`;
    parts.push(svg("text", { x: left + (width - left - right) * share, y: height - 4, "text-anchor": anchor }, text));
  }
  if (marks) {
    history.forEach((sample, i) => {
      if (i && sample.epoch > history[i - 1].epoch) parts.push(svg("line", { class: "mark", x1: x(i), x2: x(i), y1: above, y2: above + 10 }));
    });
  }
  lines.forEach(({ values, style, label }, which) => {
    const path = pathOf(values, x, y);
    if (path && !which) parts.push(svg("path", { class: "area", d: areaOf(values, x, y) }));
    if (path) parts.push(svg("path", { class: style, d: path }));
    parts.push(svg("text", { class: style, x: left + 6 + which * 110, y: 11 }, label));
  });
  canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
  canvas.replaceChildren(...parts);
}

function pathOf(values, x, y) {
  let path = "", open = false;
  values.forEach((value, i) => {
    if (value === null) { open = false; return; }
    path += `${open ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    open = true;
  });
  return path;
}

function areaOf(values, x, y) {
  const runs = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (!i || values[i - 1] === null) runs.push([]);
    runs.at(-1).push(i);
  });
  return runs.map((run) => {
    const over = run.map((i) => `L${x(i).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
    return `M${x(run[0]).toFixed(1)} ${y(0)}${over}L${x(run.at(-1)).toFixed(1)} ${y(0)}Z`;
  }).join("");
}

// The heat map ---------------------------------------------------------------------------------

function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim().match(/[\da-f]{2}/gi).map((hex) => parseInt(hex, 16));
  const [less, even, more] = ["--less", "--even", "--more"].map(read);
  return (load) => {
    const reach = Math.max(-1, Math.min(1, Math.log2(Math.max(load, 1e-3))));
    const end = reach < 0 ? less : more;
    return `rgb(${even.map((from, i) => Math.round(from + (end[i] - from) * Math.abs(reach))).join(" ")})`;
  };
}

const HEAT = { left: 56, below: 22 };

function drawHeat() {
  const canvas = $("heat"), load = now.load ?? [];
  $("window").textContent = now.window_s ?? 0;
  const numLayers = load.length, numRanks = numLayers ? load[0].length : 0;
  const width = canvas.parentElement.clientWidth, scale = devicePixelRatio || 1;
  const cell = numLayers ? Math.max(3, Math.min(26, Math.floor(420 / numRanks))) : 60;
  const height = (numLayers ? numRanks * cell : 60) + HEAT.below;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  pen.font = `11.5px ${style.fontFamily}`;
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--quiet");
  pen.textBaseline = "middle";
  if (!numLayers) { pen.fillText("no expert has computed anything in this time", HEAT.left, 30); return; }
  const step = (width - HEAT.left) / numLayers, colour = colours();
  for (let rank = 0; rank < numRanks; rank += Math.ceil(16 / cell)) {
    pen.textAlign = "right";
    pen.fillText(`rank ${rank}`, HEAT.left - 6, Math.max(7, (rank + 0.5) * cell));
  }
  pen.textAlign = "center";
  for (let layer = 0; layer < numLayers; layer += Math.ceil(40 / step)) {
    pen.fillText(`${layer ? "" : "layer "}${facts.layers[layer]}`, HEAT.left + (layer + 0.5) * step, height - 9);
  }
  load.forEach((ofLayer, layer) => ofLayer.forEach((value, rank) => {
    pen.fillStyle = colour(value);
    pen.fillRect(HEAT.left + layer * step, rank * cell, Math.ceil(step) - (step > 6 ? 1 : 0), cell - (cell > 5 ? 1 : 0));
    if (step >= 44 && cell >= 18) {
      pen.fillStyle = Math.abs(Math.log2(Math.max(value, 1e-3))) > 0.6 ? "#ffffff" : style.color;
      pen.fillText(value.toFixed(2), HEAT.left + (layer + 0.5) * step, (rank + 0.5) * cell);
    }
  }));
}

$("heat").addEventListener("pointermove", (event) => {
  const load = now.load ?? [];
  if (!load.length) return;
  const box = $("heat").getBoundingClientRect();
  const layer = Math.floor(((event.clientX - box.left - HEAT.left) / (box.width - HEAT.left)) * load.length);
  const rank = Math.floor(((event.clientY - box.top) / (box.height - HEAT.below)) * load[0].length);
  const value = load[layer]?.[rank];
  $("pointed").textContent = value === undefined ? "\u00a0" :
    `layer ${facts.layers[layer]}, rank ${rank} (node ${Math.floor(rank / facts.ranks_per_node)}): ${value.toFixed(2)} of the layer's mean`;
});
$("heat").addEventListener("pointerleave", () => { $("pointed").textContent = "\u00a0"; });

// Tables ---------------------------------------------------------------------------------------

function table(id, titles, rows, nothing) {
  const head = element("tr");
  head.append(...titles.map((title) => element("th", title)));
  const body = rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((cell) => { const made = element("td", cell); made.title = cell; return made; }));
    return row;
  });
  if (!rows.length) {
    const cell = element("td", nothing, "quiet");
    cell.colSpan = titles.length;
    const row = element("tr");
    row.append(cell);
    body.push(row);
  }
  $(id).replaceChildren(head, ...body);
}

function drawTables() {
  const links = now.links ?? [];
  table("ranks", ["rank", "node", "inside node", "between nodes", "step"], links.map((link, rank) =>
    [`${rank}`, `${Math.floor(rank / facts.ranks_per_node)}`, `${bytes(link.intra)}/s`, `${bytes(link.inter)}/s`, `${number(link.step_ms, 1)} ms`]),
  "no rank has been heard yet");
  const moves = now.rebalances;
  $("rebalancing").textContent = moves ? `automatic: ${moves.state}` : "this server has no ranks to ask";
  table("moves", ["what", "so far"], moves ? [
    ["rebalances", `${moves.started} started, ${moves.finished} finished, ${moves.abandoned} abandoned`],
    ["experts moved", `${number(moves.moves)} (${bytes(moves.bytes)})`],
    ["steps stalled for it", `${number(moves.stall_ms, 2)} ms`],
    ["now", moves.running ? moves.doing || "planning" : "–"],
    ["last reason", moves.last_reason || "–"],
    ["last error", moves.last_error || "–"],
  ] : [], "–");
  table("replicas", ["replica", "in flight", "running", "waiting", "KV cache", "last heard"], now.replicas.map((each) =>
    [`${each.replica}`, number(each.in_flight), number(each.running), number(each.waiting), `${number(100 * each.kv_usage)} %`, `${number(each.last_heard_s, 1)} s ago`]),
  "no replica is attached");
  table("requests", ["request", "replica", "age", "prompt", "cached", "tokens"], now.requests.map((each) =>
    [each.id, `${each.replica}`, `${number(each.age_s, 1)} s`, number(each.prompt_tokens), number(each.cached_tokens), `${number(each.tokens)} / ${number(each.max_tokens)}`]),
  "none");
  $("requests-note").textContent = now.num_requests > now.requests.length ? `the oldest ${now.requests.length} of ${now.num_requests}` : "the oldest first";
}

follow();
