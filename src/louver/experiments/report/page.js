"use strict";
// Draws what the page's data holds: charts of result rows, and the recording of a generation. It computes no figure.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, text = "", parent = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

// ---- hovering
const tip = document.getElementById("tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + box.height + 24 > innerHeight ? y - box.height - 12 : y + 16) + "px";
}
const hideTip = () => { tip.hidden = true; };
function explain(node, text) {
  node.addEventListener("pointermove", (event) => showTip(text(), event.clientX, event.clientY));
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("focus", () => { const b = node.getBoundingClientRect(); showTip(text(), b.right, b.top); });
  node.addEventListener("blur", hideTip);
}

// ---- axes
function written(value, axis) {
  const round = (v) =>
    v && Math.abs(v) < 1e-4
      ? Number(v.toPrecision(3)).toExponential()
      : Number(v.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 6 });
  return axis.share ? round(100 * value) + "%" : round(value);
}
function scale(values, axis, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  if (axis.log) {
    low = Math.log10(low), high = Math.log10(high);
    if (high - low < 0.3) low -= 0.15, high += 0.15;
    const pad = 0.04 * (high - low);
    low -= pad, high += pad;
    let ticks = [];
    for (const steps of [[1], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
      ticks = [];
      for (let power = Math.floor(low); power <= Math.ceil(high); power++) for (const m of steps) {
        const at = power + Math.log10(m);
        if (at >= low && at <= high) ticks.push(m * 10 ** power);
      }
      if (ticks.length >= 3) break;
    }
    return { ticks, at: (v) => from + ((Math.log10(v) - low) / (high - low)) * (to - from) };
  }
  if (axis.zero) low = Math.min(0, low);
  if (high === low) high = low + 1;
  const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((g) => g >= rough);
  if (!axis.zero) low -= 0.03 * (high - low);
  high += 0.04 * (high - low);
  const ticks = [];
  for (let v = Math.ceil(low / gap) * gap; v <= high; v += gap) ticks.push(Math.abs(v) < gap / 1e6 ? 0 : v);
  return { ticks, at: (v) => from + ((v - low) / (high - low)) * (to - from) };
}

// ---- charts
function draw(holder, chart) {
  const series = [...new Set(chart.points.map((p) => p.series))];
  const lines = chart.dots ? [...new Set(chart.points.map((p) => p.y))] : [];
  const left = chart.dots ? Math.min(330, 24 + 6.6 * Math.max(...lines.map((l) => l.length))) : 74;
  const width = 980, keys = [];
  let across = left, row = 0;
  for (const name of series.length > 1 ? series : []) {
    const wide = 34 + 6.8 * name.length;
    if (across > left && across + wide > width) across = left, row++;
    keys.push([across, 34 + 20 * row]);
    across += wide;
  }
  const top = 34 + (keys.length ? 20 * row + 24 : 0), bottom = 48;
  const height = top + bottom + (chart.dots ? 24 * lines.length + 10 : 340);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.title });
  make("text", { x: 0, y: 16, class: "title" }, chart.title, svg);
  const xs = chart.points.map((p) => p.x).concat(chart.mark === null ? [] : [chart.mark]);
  const x = scale(xs, chart.x, left, width - 24);
  const y = chart.dots
    ? { ticks: lines, at: (name) => top + 18 + 24 * lines.indexOf(name) }
    : scale(chart.points.flatMap((p) => (p.low === undefined ? [p.y] : [p.low, p.high])), chart.y, height - bottom, top);
  for (const tick of x.ticks) {
    make("line", { class: "rule", x1: x.at(tick), x2: x.at(tick), y1: top, y2: height - bottom }, "", svg);
    make("text", { x: x.at(tick), y: height - bottom + 17, "text-anchor": "middle" }, written(tick, chart.x), svg);
  }
  for (const tick of y.ticks) {
    make("line", { class: "rule", x1: left, x2: width - 24, y1: y.at(tick), y2: y.at(tick) }, "", svg);
    make("text", { x: left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, chart.dots ? tick : written(tick, chart.y), svg);
  }
  make("text", { x: (left + width - 24) / 2, y: height - 8, "text-anchor": "middle" }, chart.x.label, svg);
  if (!chart.dots) make("text", { x: 14, y: (top + height - bottom) / 2, "text-anchor": "middle",
    transform: `rotate(-90 14 ${(top + height - bottom) / 2})` }, chart.y.label, svg);
  if (chart.mark !== null) make("line", { class: "mark", x1: x.at(chart.mark), x2: x.at(chart.mark), y1: top, y2: height - bottom }, "", svg);
  const taken = chart.points.map((p) => [x.at(p.x) - 5, y.at(p.y) - 5, x.at(p.x) + 5, y.at(p.y) + 5]);
  series.forEach((name, number) => {
    const color = `var(--s${number % 8})`, mine = chart.points.filter((p) => p.series === name);
    if (chart.kind === "lines") {
      const path = mine.map((p, i) => `${i ? "L" : "M"}${x.at(p.x).toFixed(1)} ${y.at(p.y).toFixed(1)}`).join("");
      make("path", { d: path, fill: "none", stroke: color, "stroke-width": 1.7 }, "", svg);
    }
    const small = chart.kind === "lines" && mine.length > 60;
    for (const p of mine) {
      if (p.low !== undefined) make("line", { x1: x.at(p.x), x2: x.at(p.x), y1: y.at(p.low), y2: y.at(p.high), stroke: color, opacity: 0.6 }, "", svg);
      const dot = make("path", { class: "point", d: shape(number, x.at(p.x), y.at(p.y), small ? 2.2 : 4.6), stroke: color,
        tabindex: small ? -1 : 0, "stroke-width": 1.8, fill: p.proven ? color : "var(--panel)" }, "", svg);
      explain(dot, () => chart.notes.columns.map((c, i) => `${c}: ${chart.notes.cells[p.row][i]}`).join("\n"));
      if (p.label) place(p, x.at(p.x), y.at(p.y), taken, svg, width);
    }
  });
  keys.forEach(([at, high], number) => {
    make("path", { d: shape(number, at + 5, high, 4.6), fill: `var(--s${number % 8})` }, "", svg);
    make("text", { x: at + 15, y: high + 4 }, series[number], svg);
  });
  holder.replaceChildren(svg);
}
function shape(number, x, y, r) {
  // Colours repeat after eight series; then marks are squares, and then diamonds.
  if (number < 8) return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;
  const s = number < 16 ? 0.9 * r : 1.25 * r;
  return number < 16 ? `M${x - s} ${y - s}h${2 * s}v${2 * s}h${-2 * s}z` : `M${x} ${y - s}l${s} ${s}l${-s} ${s}l${-s} ${-s}z`;
}
function place(p, x, y, taken, svg, width) {
  // A label goes where no other stands: right of its point, left, above, below; else nowhere (hovering still tells).
  const w = 6.6 * p.label.length, h = 13;
  for (const [dx, dy] of [[8, 4], [-8 - w, 4], [-w / 2, -9], [-w / 2, 18], [6, -9], [6, 18], [-w / 2, -24], [-w / 2, 33]]) {
    const box = [x + dx, y + dy - h, x + dx + w, y + dy];
    if (box[0] < 60 || box[2] > width) continue;
    if (taken.some((o) => box[0] < o[2] && box[2] > o[0] && box[1] < o[3] && box[3] > o[1])) continue;
    taken.push(box);
    make("text", { x: x + dx, y: y + dy }, p.label, svg);
    return;
  }
}
document.querySelectorAll(".chart").forEach((holder) => draw(holder, data.charts[Number(holder.dataset.chart)]));

// ---- the recording
function player(recording) {
  const slider = document.getElementById("step"), text = document.getElementById("text");
  const layers = Object.keys(recording.steps[0]);
  for (const frames of recording.steps) for (const frame of Object.values(frames))
    for (const name of ["tokens", "weights"]) frame[name] = frame[name].split(" ").map(Number);
  let layer = layers[Math.floor(layers.length / 2)], lit = [], timer = null;
  document.getElementById("policy").textContent = recording.policy;
  slider.max = recording.steps.length - 1;
  const spans = recording.texts.map((token) => {
    const span = document.createElement("span");
    span.textContent = token;
    return text.appendChild(span);
  });
  const weightOf = new Map();
  text.addEventListener("pointermove", (event) => {
    const position = spans.indexOf(event.target);
    if (position < 0) return hideTip();
    const weight = weightOf.get(position);
    showTip(`token ${position.toLocaleString("en")}\n${weight === undefined ? "not among the strongest" : written(weight, { share: true }) + " of layer " + layer + "'s attention"}`, event.clientX, event.clientY);
  });
  text.addEventListener("pointerleave", hideTip);

  const buttons = layers.map((name) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "layer";
    button.setAttribute("role", "radio");
    button.innerHTML = `<b>Layer ${name}</b><span class="bar"><i class="exact"></i><i class="sketched"></i></span><small></small>`;
    button.addEventListener("click", () => { layer = name; show(); });
    explain(button, () => {
      const f = recording.steps[slider.value][name], share = (v) => written(v, { share: true });
      return `layer ${name}\nexact: ${share(f.exact)} of the keys\nsketched value: ${share(f.sketched)}\nvalue unread: ${share(f.unread)}\nbytes read: ${share(f.bytes)} of dense`;
    });
    return document.getElementById("layers").appendChild(button);
  });

  function show() {
    const step = Number(slider.value), frames = recording.steps[step], now = recording.first_step + step;
    for (const span of lit) { span.className = ""; span.style.backgroundColor = ""; }
    weightOf.clear();
    lit = frames[layer].tokens.map((position, i) => {
      const weight = frames[layer].weights[i], strength = Math.min(1, 0.1 + 1.6 * Math.sqrt(weight));
      const span = spans[position];
      weightOf.set(position, weight);
      span.className = strength > 0.55 ? "hit strong" : "hit";
      span.style.backgroundColor = `rgba(var(--heat), ${strength.toFixed(3)})`;
      return span;
    });
    spans.forEach((span, position) => { span.hidden = position > now; });
    spans[now].classList.add("now");
    lit.push(spans[now]);
    buttons.forEach((button, i) => {
      const frame = frames[layers[i]];
      button.setAttribute("aria-checked", layers[i] === layer);
      button.querySelector(".exact").style.width = 100 * frame.exact + "%";
      button.querySelector(".sketched").style.width = 100 * frame.sketched + "%";
      button.querySelector("small").textContent = `${Math.round(100 * frame.unread)}% unread · ${Math.round(100 * frame.bytes)}% bytes`;
    });
    const before = recording.texts.slice(recording.first_step + 1, now + 1), output = document.getElementById("written");
    output.textContent = before.slice(-60, -1).join("");
    const mark = document.createElement("mark");
    mark.textContent = before.length ? before[before.length - 1] : "(the last token of the prompt)";
    output.appendChild(mark);
    document.getElementById("where").textContent = `step ${step + 1} of ${recording.steps.length}`;
    map(frames, now);
  }

  function map(frames, now) {
    // The whole text as a line: a stroke per strong token, as high as its weight.
    const svg = make("svg", { viewBox: "0 0 1000 46", preserveAspectRatio: "none" });
    make("line", { x1: 0, x2: 1000, y1: 40, y2: 40, stroke: "var(--rule)" }, "", svg);
    frames[layer].tokens.forEach((position, i) => {
      const at = (1000 * (position + 0.5)) / (now + 1), tall = 4 + 34 * Math.min(1, 1.6 * Math.sqrt(frames[layer].weights[i]));
      make("line", { x1: at, x2: at, y1: 40, y2: 40 - tall, stroke: "var(--exact)", "stroke-width": 1.6 }, "", svg);
    });
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      const span = spans[Math.floor(((event.clientX - box.left) / box.width) * (now + 1))];
      if (span) text.scrollTop = span.offsetTop - text.offsetTop - 120;
    });
    document.getElementById("map").replaceChildren(svg);
  }

  slider.addEventListener("input", show);
  const play = document.getElementById("play");
  play.addEventListener("click", () => {
    if (timer) { clearInterval(timer); timer = null; play.textContent = "▶"; return; }
    play.textContent = "❚❚";
    timer = setInterval(() => { slider.value = (Number(slider.value) + 1) % recording.steps.length; show(); }, 220);
  });
  show();
  text.scrollTop = text.scrollHeight;
}
if (data.recording) player(data.recording);

// ---- light and dark
document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, root = document.documentElement;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
