// Draws the curves with Plotly, moves their common cursor, filters the rows and the groups. What a
// model wrote is never read here: cards carry numbers and words of our own only.
"use strict";

const byId = (id) => document.getElementById(id);
const charts = JSON.parse(byId("charts-data").textContent);
const colors = matchMedia("(prefers-color-scheme: dark)");
const dashes = ["solid", "dash", "dot", "dashdot"];
const touch = matchMedia("(pointer: coarse)").matches; // dragging scrolls there
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (text) => (text.length > 40 ? `${text.slice(0, 39)}…` : text);
// Plotly reads some tags in the texts it is given.
const plain = (text) => short(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const steps = [...new Set(charts.flatMap((c) => c.lines.flatMap((l) => l.x)))].sort((a, b) => a - b);
const lastStep = steps.length ? steps[steps.length - 1] : 0;
let cursor = null; // the step that it stands on

// Whether all lines have values at the same steps. If not, a label says each value's own step.
const inStep = (chart) => chart.lines.every((line) => line.x.join() === chart.lines[0].x.join());

function traces(chart) {
  const hovertemplate = inStep(chart) ? "%{y:.4~g}" : "%{y:.4~g} (step %{x})";
  const series = css("--series").split(" ");
  const drawn = [];
  chart.lines.forEach((line, i) => {
    const color = series[line.color % series.length];
    const dash = dashes[line.color % dashes.length];
    const alone = line.points || line.x.length === 1;
    drawn.push({
      x: line.x, y: line.y, name: plain(line.name), mode: alone ? "lines+markers" : "lines",
      line: { color, dash: line.mean.length ? "solid" : dash, width: line.mean.length ? 1 : 2 },
      opacity: line.mean.length ? 0.5 : 1, legendgroup: String(i), showlegend: !line.mean.length,
      hovertemplate,
    });
    if (line.mean.length) {
      drawn.push({
        x: line.x, y: line.mean, name: plain(line.name), mode: "lines", hoverinfo: "skip",
        line: { color, dash, width: 3 }, legendgroup: String(i),
      });
    }
  });
  return drawn;
}

function height(chart) {
  return 220 + (chart.lines.length > 1 ? 21 * Math.ceil(chart.lines.length / 3) : 0);
}

function layout(chart) {
  const ink = css("--ink"), soft = css("--soft"), grid = css("--line"), warn = css("--warn");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
  const pad = Math.max(lastStep, 1) * 0.02;
  return {
    height: height(chart), margin: { l: 44, r: 10, t: 10, b: 30 }, dragmode: touch ? false : "zoom",
    paper_bgcolor: css("--panel"), plot_bgcolor: css("--panel"),
    font: { color: soft, size: 12, family: "system-ui, sans-serif" },
    hovermode: "x unified", hoverdistance: inStep(chart) ? -1 : 20, showlegend: chart.lines.length > 1,
    hoverlabel: { bgcolor: css("--page"), bordercolor: soft, font: { color: ink } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
    xaxis: {
      ...axis, range: [-pad, lastStep + pad], unifiedhovertitle: { text: "step %{x}" },
      showspikes: true, spikemode: "across", spikesnap: "hovered data", spikethickness: 1,
      spikecolor: soft, spikedash: "solid", nticks: 6,
    },
    yaxis: { ...axis, fixedrange: true, nticks: 6 },
    shapes: chart.marks.map((m) => ({
      type: "line", x0: m.x, x1: m.x, y0: 0, y1: 1, yref: "paper",
      line: { color: warn, width: 1.5, dash: "dot" },
    })),
    annotations: chart.marks.map((m) => ({
      x: m.x, y: 1, yref: "paper", yanchor: "top", text: m.text, showarrow: false,
      font: { color: css("--page"), size: 11 }, bgcolor: warn, borderpad: 2,
    })),
  };
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((other, i) => { if (Math.abs(other - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

// Puts the cursor of every chart but `source` on the values nearest to `step`.
function moveCursor(step, source) {
  cursor = step;
  for (const chart of charts) {
    if (chart.plot === source) continue;
    Plotly.Fx.hover(chart.plot, { xval: step, yval: 0 }, "xy");
  }
}

function read(step) {
  const parts = charts.flatMap((chart) => chart.lines
    .filter((line) => line.x.includes(step))
    .map((line) => [chart.lines.length > 1 ? line.name : chart.title, line.y[line.x.indexOf(step)]])
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`));
  byId("reading").textContent = `step ${step}: ${parts.join(", ")}`;
}

function clearCursor(source) {
  charts.forEach((chart) => { if (chart.plot !== source) Plotly.Fx.unhover(chart.plot); });
}

function drawAll() {
  for (const chart of charts) Plotly.react(chart.plot, traces(chart), layout(chart), { displayModeBar: false, responsive: true });
}

function startCharts() {
  let leaving = 0;
  for (const chart of charts) {
    chart.plot = byId(`chart-${chart.id}`);
    chart.plot.textContent = "";
  }
  drawAll();
  colors.addEventListener("change", drawAll);
  for (const { plot } of charts) {
    plot.on("plotly_hover", (event) => {
      clearTimeout(leaving); // from one step to the next: do not flicker
      moveCursor(event.points[0].x, plot);
    });
    plot.on("plotly_unhover", () => { leaving = setTimeout(() => clearCursor(plot), 80); });
    plot.on("plotly_relayout", () => {
      const range = plot.layout.xaxis.range;
      for (const { plot: other } of charts) { // those that have followed already call no other
        if (other.layout.xaxis.range.join() !== range.join()) Plotly.relayout(other, { "xaxis.range": [...range] });
      }
    });
  }
  byId("charts").addEventListener("keydown", (event) => {
    const place = cursor === null ? -1 : nearest(steps, cursor);
    const by = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: place - by, ArrowRight: place + by, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const step = steps[Math.min(Math.max(to, 0), steps.length - 1)];
    moveCursor(step, null);
    read(step);
  });
  byId("charts").addEventListener("blur", () => {
    cursor = null;
    clearCursor(null);
    byId("reading").textContent = "";
  });
}

function startGallery() {
  const cards = [...document.querySelectorAll(".card")];
  const update = () => {
    const kind = byId("by-class").value, verdict = byId("by-verdict").value;
    const order = byId("by-order").value;
    let shown = 0;
    for (const card of cards) {
      const { now, change } = card.dataset;
      const fits = (!kind || card.dataset.class === kind) && (!verdict || verdict === now || verdict === change);
      card.hidden = !fits;
      shown += fits;
    }
    const place = (card) => JSON.parse(card.dataset.orders)[order];
    byId("cards").append(...cards.sort((a, b) => place(a) - place(b)));
    byId("shown").textContent = `${shown} shown`;
  };
  for (const id of ["by-class", "by-verdict", "by-order"]) byId(id).addEventListener("change", update);
  for (const check of document.querySelectorAll("#gallery-controls [data-kind]")) {
    check.addEventListener("change", () => byId("cards").classList.toggle(`hide-${check.dataset.kind}`, !check.checked));
  }
  update(); // a browser may remember the choices of before
}

function startGroups() {
  const groups = [...document.querySelectorAll(".group")];
  const update = () => {
    const life = byId("by-life").value;
    for (const group of groups) group.hidden = Boolean(life) && group.dataset.life !== life;
    byId("groups-shown").textContent = `${groups.filter((group) => !group.hidden).length} shown`;
  };
  byId("by-life").addEventListener("change", update);
  byId("open-all").addEventListener("click", () => groups.forEach((group) => { group.open = true; }));
  update();
}

if (charts.length) startCharts();
if (byId("cards")) startGallery();
if (byId("by-life")) startGroups();
