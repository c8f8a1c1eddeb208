"use strict";
// Draws what the page's JSON holds; tables and sentences are in the page already and work without this.
const DATA = JSON.parse(document.getElementById("data").textContent);
const HOLLOW = {lenient: "triangle-down", standard: "circle", strict: "triangle-up"};
const STATISTICS = {
  "norm/out": "output norm", "norm/in": "input norm", "norm/weight": "weight norm", "norm/grad": "gradient norm of the weight",
  "norm/in_grad": "gradient norm at the input", "norm/update": "norm of the update", "norm/adam_m": "Adam: first moment",
  "norm/adam_v": "Adam: second moment", "adam/surprise": "Adam: surprise (mean g² / mean v)",
};
const BY_LAYER = {
  "grad/norm_by_layer": "gradient norm of the block", "residual/norm": "residual norm",
  "attn/max_logit": "maximum attention logit", "attn/entropy": "attention entropy (nats)",
};
const SINGLE = {"grad/norm": "global gradient norm, before clipping", "grad/clipped": "clipped (1) or not (0)", "train/lr": "learning rate", "val/loss": "validation loss"};
const SITES = ["qkv", "proj", "fc1", "fc2", "head"];
const DEPTHS = {light: ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39"], dark: ["#8f7fe8", "#5f8ae0", "#3f9cc4", "#2fb09a", "#5cc66e", "#a3d94a", "#f0e650"]};
const TIMES = {light: ["#0d0887", "#5c01a6", "#9c179e", "#cc4778", "#ed7953", "#e09b20", "#b5a300"], dark: ["#7f7bff", "#a26cf2", "#c95fd0", "#e2659a", "#f0866a", "#fbae45", "#f3e65f"]};

const text = word => String(word).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const number = value => typeof value === "number" ? value : null;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Named one by one: plotly's own choice has a button that sends the data to its maker.
const BUTTONS = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];
const PRINTED = 960;  // pixels: a sheet on its side, A4 or letter
let printed = 0;  // the width of a plot on paper while one prints, else 0: as wide as there is room

const theme = () => css("--paper") === "#fff" ? "light" : "dark";
const narrow = () => window.innerWidth < 640;
const median = values => { const v = [...values].sort((a, b) => a - b), m = v.length >> 1; return v.length % 2 ? v[m] : (v[m - 1] + v[m]) / 2; };
const rate = value => { const [m, e] = value.toExponential(2).split("e"); return +e >= -1 && +e <= 5 ? String(+value.toPrecision(3)) : `${+m}e${+e}`; };
const unique = values => [...new Set(values)];

function axis(title, more = {}) {
  return {title: {text: title, standoff: 8}, gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, ...more};
}

function rateAxis(more = {}) {
  const ticks = [];
  for (let power = -7; power <= 3; power++) for (const lead of [1, 3]) ticks.push(lead * 10 ** power);
  return axis("learning rate", {type: "log", tickvals: ticks, ticktext: ticks.map(rate), ...more});
}

function draw(place, traces, layout) {
  const config = {responsive: true, displayModeBar: narrow() || printed ? false : "hover", displaylogo: false, modeBarButtons: [BUTTONS], toImageButtonOptions: {format: "svg"}};
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: css("--ink"), family: "inherit", size: 12},
    margin: {l: 50, r: 10, t: 30, b: 45}, legend: {orientation: "h", y: -0.22, yanchor: "top", maxheight: 4000}, hovermode: "closest", height: 420, ...(printed && {width: printed}), modebar: {bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--ink")},
  };
  return Plotly.react(place, traces, {...base, ...layout}, config);
}

function nothing(place, sentence) {
  Plotly.purge(place);
  const said = document.createElement("p");
  said.className = "note";
  said.textContent = sentence;
  place.replaceChildren(said);
}

class Study {
  constructor(root, data) {
    Object.assign(this, {root, data, panel: null, hidden: new Set()});
    this.runs = new Map(data.rows.map(row => [row.run_id, row]));
    const arms = Object.keys(data.looks);
    this.traced = data.rows.filter(row => data.traces[row.run_id]).sort((a, b) => arms.indexOf(a.arm) - arms.indexOf(b.arm) || a.lr - b.lr || a.seed - b.seed);
    this.shown = new Set(this.traced.map(row => row.run_id));
    this.tabs = [...root.querySelectorAll("[role=tab]")];
    this.tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => this.open(tab));
      tab.addEventListener("keydown", event => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
        if (step) { const next = this.tabs[(place + step + this.tabs.length) % this.tabs.length]; next.focus(); this.open(next); }
      });
    });
    root.querySelectorAll("[data-variant]").forEach(box => box.addEventListener("change", () => this.toggle(this.hidden, box.dataset.variant, !box.checked)));
    root.querySelectorAll("[data-run]").forEach(box => box.addEventListener("change", () => this.toggle(this.shown, box.dataset.run, box.checked)));
    root.querySelectorAll("[data-choose]").forEach(button => button.addEventListener("click", () => this.choose(button.dataset.choose)));
    root.querySelectorAll(".controls select").forEach(box => box.addEventListener("change", () => { this.offerLayers(); this.render(); }));
    root.querySelectorAll("table").forEach(sortable);
    this.offerStatistics();
    if (this.tabs.length) this.open(this.tabs[0]);
  }

  toggle(set, word, present) {
    if (present) set.add(word); else set.delete(word);
    for (const row of this.root.querySelectorAll("[data-arm]")) row.hidden = this.hidden.has(row.dataset.arm);
    this.render();
  }

  open(tab) {
    this.panel = tab.dataset.panel;
    for (const other of this.tabs) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
    }
    this.render();
  }

  render(all = false) {
    if (this.root.hidden && !all) return;
    for (const place of this.root.querySelectorAll("[data-plot]")) {
      if (all || !place.closest("[role=tabpanel]").hidden) this[place.dataset.plot](place);
    }
  }

  control(name) { return this.root.querySelector(`[data-control=${name}]`); }

  choose(run) {
    const row = this.runs.get(run), side = row.verdict === "diverged" ? "right" : "left";
    this.control(side).value = run;
    this.open(this.tabs.find(tab => tab.dataset.panel === "inside"));
    for (const other of this.root.querySelectorAll("tr[data-id]")) other.classList.toggle("picked", other.dataset.id === run);
    this.root.querySelector("[data-panel=inside]").focus();
  }

  offerStatistics() {
    const box = this.control("statistic");
    if (!box) return;
    const keys = unique(this.traced.flatMap(row => Object.keys(this.data.traces[row.run_id].curves)));
    const options = Object.entries(STATISTICS).filter(([head]) => keys.some(key => key.startsWith(head + "/")));
    const others = Object.entries({...BY_LAYER, ...SINGLE}).filter(([key]) => keys.includes(key));
    box.replaceChildren(...[...options, ...others].map(([key, label]) => new Option(label, key)));
    this.offerLayers();
  }

  key() {
    const statistic = this.control("statistic").value;
    return statistic in STATISTICS ? `${statistic}/${this.control("site").value}` : statistic;
  }

  sides() { return unique([this.control("left").value, this.control("right").value]).filter(run => this.data.traces[run]); }

  offerLayers() {
    const box = this.control("layer"), old = box.value;
    const count = Math.max(0, ...this.sides().map(run => this.data.traces[run].curves[this.key()]?.v.length ?? 0));
    box.replaceChildren(new Option("all", "all"), ...Array.from({length: count}, (_, layer) => new Option(`layer ${layer}`, layer)));
    box.value = [...box.options].some(option => option.value === old) ? old : "all";
    this.control("site").disabled = !(this.control("statistic").value in STATISTICS);
  }

  look(arm) { return this.data.looks[arm] ?? {colour: "#767676", symbol: "circle", dash: "solid"}; }
  arms() { return Object.keys(this.data.looks).filter(arm => !this.hidden.has(arm)); }
  rows() { return this.data.rows.filter(row => !this.hidden.has(row.arm)); }
  steps(run, key) { const curve = this.data.traces[run].curves[key]; return curve ? this.data.traces[run].axes[curve.s] : []; }
  name(row) { return text(`${row.arm} lr=${rate(row.lr)} s${row.seed}`); }

  loss_by_lr(place) {
    const traces = [], rows = this.rows().filter(row => row.final_loss !== null);
    if (!rows.length) return nothing(place, "No run to draw.");
    const start = median(this.data.rows.map(row => number(row.init_loss)).filter(loss => loss !== null));
    const capped = row => Math.min(number(row.final_loss) ?? start, start);
    for (const arm of this.arms()) {
      const own = rows.filter(row => row.arm === arm), look = this.look(arm);
      const rates = unique(own.map(row => row.lr)).sort((a, b) => a - b);
      const middles = rates.map(at => median(own.filter(row => row.lr === at).map(capped)));
      const group = {legendgroup: arm, hoverinfo: "skip"};
      traces.push({...group, x: rates, y: middles, mode: "lines", showlegend: false, line: {color: look.colour, dash: look.dash}});
      for (const lost of [false, true]) {
        const part = own.filter(row => (row.verdict === "diverged") === lost);
        traces.push({
          legendgroup: arm, x: part.map(row => row.lr), y: part.map(capped), mode: "markers", showlegend: !lost, name: text(this.data.labels[arm] ?? arm),
          marker: {color: look.colour, symbol: lost ? "x-thin-open" : look.symbol, size: lost ? 11 : 8, line: {color: look.colour, width: lost ? 2.5 : 0}},
          text: part.map(row => `${this.name(row)}<br>${text(row.verdict)}, final loss ${row.final_loss}`), hoverinfo: "text",
        });
        if (!lost && !part.length) traces.at(-1).x = [null], traces.at(-1).y = [null];
      }
    }
    traces.push({x: [null], y: [null], mode: "markers", name: "diverged", marker: {symbol: "x-thin-open", size: 10, line: {width: 2.5, color: css("--faint")}}});
    draw(place, traces, {xaxis: rateAxis(), yaxis: axis("final training loss (nats a token)"), height: narrow() ? 480 : 440,
      shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: start, y1: start, line: {dash: "dot", width: 1, color: css("--faint")}}],
      annotations: [{xref: "paper", x: 1, xanchor: "right", y: start, yanchor: "bottom", text: "loss at initialisation", showarrow: false, font: {size: 10, color: css("--faint")}}]});
  }

  divergence_map(place) {
    const told = this.data.told.variants, arms = this.arms().filter(arm => told[arm]), traces = [];
    if (!arms.length) return nothing(place, "No variant is shown.");
    arms.forEach((arm, place) => {
      const y = -place, runs = told[arm].runs, look = this.look(arm);
      const share = runs.map(at => at.diverged / at.runs);
      traces.push({
        x: runs.map(at => at.lr), y: this.dodged(runs).map(height => y + height), mode: "markers+text", showlegend: false, hoverinfo: "text",
        marker: {symbol: "square", size: narrow() ? 15 : 21, color: share, colorscale: [[0, "#f4f1ea"], [0.5, "#e69f00"], [1, "#8c2d04"]], cmin: 0, cmax: 1, line: {color: "#444", width: 1}},
        text: runs.map(at => `${at.diverged}/${at.runs}`), textfont: {size: narrow() ? 7 : 9, color: share.map(part => part > 0.6 ? "#fff" : "#000")},
        hovertext: runs.map(at => `${text(arm)}, learning rate ${rate(at.lr)}:<br>${at.diverged} of ${at.runs} diverged, ${at.undecided} undecided`),
      });
      Object.keys(HOLLOW).forEach((level, line) => {
        const known = told[arm].frontier[level];
        if (known) for (const [name, lower] of [["lr50", 0], ["lr10", 0.06]]) {
          traces.push(...this.interval(known[name], `${text(arm)}, ${name} (${level})`, y - 0.08 - 0.13 * line - lower, look.colour, HOLLOW[level], name === "lr50", level === "standard"));
        }
      });
    });
    const ticks = {tickvals: arms.map((_, place) => -place), ticktext: arms.map(arm => text(arm)), range: [0.48 - arms.length, 0.5], showgrid: false};
    draw(place, traces, {xaxis: rateAxis(), yaxis: axis("", ticks), height: 110 + (narrow() ? 115 : 100) * arms.length, margin: {l: 10, r: 10, t: 20, b: 45}, showlegend: false});
  }

  // The height of each rate's square: one that would cover its neighbour stands above it.
  dodged(runs) {
    const rates = Object.values(this.data.told.variants).flatMap(arm => arm.runs.map(at => at.lr));
    const apart = (Math.log(Math.max(...rates) / Math.min(...rates)) + 2) / (narrow() ? 17 : 45), ends = [-Infinity, -Infinity, -Infinity];
    return runs.map(at => {
      const rate = Math.log(at.lr), free = ends.findIndex(end => rate - end > apart), level = free < 0 ? 2 : free;
      ends[level] = rate;
      return 0.1 + 0.15 * level;
    });
  }

  interval(ends, label, y, colour, symbol, solid, strong) {
    const known = [ends.low, ends.median, ends.high].filter(end => end !== null);
    if (!known.length) return [];
    const told = `${label}: ${ends.median === null ? "?" : rate(ends.median)}, 95 % from ${ends.low === null ? "below the range" : rate(ends.low)} to ${ends.high === null ? "beyond the range" : rate(ends.high)}`;
    const opacity = (strong ? 1 : 0.6) * (solid ? 1 : 0.7), side = end => end === null;
    const left = Math.min(...known) / (side(ends.low) ? 1.3 : 1), right = Math.max(...known) * (side(ends.high) ? 1.3 : 1);  // an arrow leads on
    return [
      {x: [left, right], y: [y, y], mode: "lines+markers", line: {color: colour, width: solid ? 2.5 : 1.2}, opacity, showlegend: false, hoverinfo: "skip",
        marker: {symbol: [side(ends.low) ? "triangle-left" : "line-ns-open", side(ends.high) ? "triangle-right" : "line-ns-open"], size: 7, color: colour}},
      {x: [ends.median], y: [y], mode: "markers", opacity, showlegend: false, hoverinfo: "text", hovertext: told,
        marker: {symbol: solid ? symbol : `${symbol}-open`, size: 9, color: colour}},
    ];
  }

  clipped_share(place) {
    const rows = this.rows().filter(row => number(row.clipped_share) !== null);
    if (!rows.length) return nothing(place, "No gradient was clipped by a norm in these runs, or none is shown.");
    const traces = this.arms().map(arm => {
      const own = rows.filter(row => row.arm === arm).sort((a, b) => a.lr - b.lr), look = this.look(arm);
      return {x: own.map(row => row.lr), y: own.map(row => row.clipped_share), mode: "lines+markers", name: text(arm), text: own.map(row => this.name(row)),
        line: {color: look.colour, dash: look.dash, width: 1}, marker: {color: look.colour, symbol: look.symbol, size: 8}};
    });
    draw(place, traces, {xaxis: rateAxis(), yaxis: axis("share of clipped steps", {range: [-0.03, 1.03]}), showlegend: true});
  }

  training_curves(place) {
    const rows = this.traced.filter(row => this.shown.has(row.run_id) && !this.hidden.has(row.arm)), traces = [], shapes = [];
    if (!rows.length) return nothing(place, "No run is chosen, or none has a record.");
    for (const row of rows) {
      const found = this.data.traces[row.run_id], look = this.look(row.arm), lost = row.verdict === "diverged", [x, y] = found.loss;
      const group = {legendgroup: row.run_id, showlegend: false, hoverinfo: "text", mode: "markers"};
      const height = step => { let best = 0; x.forEach((at, place) => { if (Math.abs(at - step) < Math.abs(x[best] - step)) best = place; }); return y[best]; };
      const scar = row.scar ? `, scar ${row.scar.toFixed(2)}` : "";
      traces.push({legendgroup: row.run_id, x, y, mode: "lines", name: `${this.name(row)}, ${text(row.verdict)}${scar}`, line: {color: look.colour, width: 1.4, dash: lost ? "dash" : "solid"}, hovertemplate: "step %{x}: %{y:.3f}"});
      const marks = [["triangle-down", 10, row.first_bad_step === null ? [] : [row.first_bad_step], `${row.verdict} from here`],
        ["y-down-open", 9, found.spikes, "spike"], ["line-ns-open", 14, found.restarts, "restart"]];
      for (const [symbol, size, steps, said] of marks) if (steps.length) {
        traces.push({...group, x: steps, y: steps.map(height), marker: {symbol, size, color: css("--ink"), line: {width: 2, color: css("--ink")}}, hovertext: steps.map(step => `${this.name(row)}<br>${text(said)}, step ${step}`)});
      }
    }
    const tops = rows.map(row => this.data.traces[row.run_id].loss[1].find(loss => loss !== null)).filter(Boolean);
    const lows = rows.flatMap(row => this.data.traces[row.run_id].loss[1]).filter(loss => loss !== null);
    draw(place, traces, {xaxis: axis("step"), yaxis: axis("training loss (nats a token)", {range: [lows.reduce((a, b) => Math.min(a, b)) - 0.2, 1.05 * Math.max(...tops)]}), shapes, height: 460 + 20 * rows.length / (narrow() ? 1 : 3)});
  }

  inside(place) {
    const sides = this.sides(), key = this.key(), only = this.control("layer").value, traces = [], annotations = [], shapes = [];
    const with_it = sides.filter(run => this.data.traces[run].curves[key]);
    if (!with_it.length) return nothing(place, "Neither of these runs has recorded this statistic.");
    const stacked = narrow();
    sides.forEach((run, side) => {
      const row = this.runs.get(run), curve = this.data.traces[run].curves[key], suffix = side ? "2" : "";
      (curve?.v ?? []).forEach((values, layer) => {
        if (only !== "all" && only !== String(layer)) return;
        const shade = DEPTHS[theme()][Math.round(6 * layer / Math.max(1, curve.v.length - 1))];
        traces.push({x: this.steps(run, key), y: values, mode: "lines", xaxis: `x${suffix}`, yaxis: `y${stacked ? suffix : ""}`, name: `layer ${layer}`, legendgroup: layer, showlegend: !traces.some(trace => trace.legendgroup === layer), line: {color: shade, width: 1.6}});
      });
      annotations.push({text: `${text(row.verdict)}: ${this.name(row)}`, xref: `x${suffix} domain`, yref: `y${stacked ? suffix : ""} domain`, x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", showarrow: false, font: {size: narrow() ? 11 : 12}});
      if (row.first_bad_step !== null) shapes.push({type: "line", xref: `x${suffix}`, yref: `y${stacked ? suffix : ""} domain`, x0: row.first_bad_step, x1: row.first_bad_step, y0: 0, y1: 1, line: {dash: "dot", width: 1.5, color: css("--ink")}});
    });
    const statistic = this.control("statistic").value, label = STATISTICS[statistic] ? `${STATISTICS[statistic]}, ${this.control("site").value}` : BY_LAYER[statistic] ?? SINGLE[statistic];
    const kind = {type: ["grad/clipped", "val/loss"].includes(statistic) ? "linear" : "log", exponentformat: "power"};
    const both = sides.length > 1, layout = {annotations, shapes, height: stacked && both ? 640 : 420, showlegend: true, legend: {orientation: "h", y: stacked ? -0.12 : -0.2, maxheight: 4000}};
    layout.xaxis = axis("step", {domain: both && !stacked ? [0, 0.485] : [0, 1], anchor: "y"});
    layout.yaxis = axis(label, {...kind, domain: both && stacked ? [0.56, 1] : [0, 1]});
    if (both) layout.xaxis2 = axis("step", {domain: stacked ? [0, 1] : [0.515, 1], anchor: stacked ? "y2" : "y"});
    if (both && stacked) layout.yaxis2 = axis(label, {...kind, domain: [0, 0.42], anchor: "x2", matches: "y"});
    draw(place, traces, layout);
  }

  gradient_by_depth(place) {
    const key = "grad/norm_by_layer", sides = this.sides().filter(run => (this.data.traces[run].curves[key]?.v.length ?? 0) > 1), traces = [], annotations = [];
    if (!sides.length) return nothing(place, "Neither of these runs has recorded gradient norms of more than one block.");
    sides.forEach((run, side) => {
      const steps = this.steps(run, key), values = this.data.traces[run].curves[key].v, suffix = side ? "2" : "", many = Math.min(7, steps.length);
      for (let line = 0; line < many; line++) {
        const at = many > 1 ? Math.round(line * (steps.length - 1) / (many - 1)) : 0;
        traces.push({x: values.map((_, layer) => layer), y: values.map(layer => layer[at]), mode: "lines+markers", xaxis: `x${suffix}`, name: `step ${steps[at]}`, legendgroup: side, showlegend: !side || String(steps) !== String(this.steps(sides[0], key)), line: {color: TIMES[theme()][line], width: 1.6}, ...(side ? {xaxis: "x2"} : {})});
      }
      annotations.push({text: this.name(this.runs.get(run)), xref: `x${suffix} domain`, yref: "paper", x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", showarrow: false, font: {size: narrow() ? 10 : 12}});
    });
    const both = sides.length > 1, layers = {dtick: 1, tick0: 0};
    draw(place, traces, {annotations, xaxis: axis("layer", {...layers, domain: both ? [0, 0.485] : [0, 1]}), ...(both ? {xaxis2: axis("layer", {...layers, domain: [0.515, 1], anchor: "y"})} : {}), yaxis: axis("gradient norm of the block", {type: "log", exponentformat: "power"}), height: narrow() ? 480 : 400});
  }

  lead_times(place) {
    const leads = this.data.leads.filter(lead => !this.hidden.has(lead.arm)), names = this.data.signals.map(signal => signal.name);
    if (!leads.length) return nothing(place, "No shown run diverged with an alarm: there is no lead to draw.");
    const traces = this.arms().map(arm => {
      const own = leads.filter(lead => lead.arm === arm), look = this.look(arm);
      return {x: own.map(lead => lead.lead), y: own.map(lead => lead.signal), mode: "markers", name: text(arm), marker: {color: look.colour, symbol: look.symbol, size: 8, opacity: 0.8}, text: own.map(lead => this.name(this.runs.get(lead.run)))};
    });
    traces.push({x: this.data.signals.map(signal => signal.share), y: names, type: "bar", orientation: "h", xaxis: "x2", marker: {color: css("--faint")}, name: "false alarms", showlegend: false});
    draw(place, traces, {yaxis: axis("", {categoryorder: "array", categoryarray: [...names].reverse()}), xaxis: axis(narrow() ? "lead, steps" : "steps before the loss (below 0: after it)", {domain: [0, 0.7], zeroline: true, zerolinecolor: css("--faint")}), xaxis2: axis("false alarms", {domain: [0.76, 1], range: [0, 1]}), height: 520, showlegend: true, margin: {l: 10, r: 10, t: 20, b: 60}});
  }
}

function sortable(table) {
  const heads = [...table.querySelectorAll("thead th")], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const rows = [...body.rows], numeric = rows.every(row => value(row) === "" || !Number.isNaN(Number(value(row))));
    const order = (a, b) => numeric ? Number(a) - Number(b) : a.localeCompare(b);
    rows.sort((a, b) => value(a) === "" || value(b) === "" ? (value(a) === "") - (value(b) === "") : (up ? 1 : -1) * order(value(a), value(b)));
    body.append(...rows);
  }));
}

const studies = [...document.querySelectorAll(".study")].map((root, place) => new Study(root, DATA.studies[place]));
document.querySelectorAll("[data-show]").forEach(button => button.addEventListener("click", () => {
  document.querySelectorAll("[data-show]").forEach(other => other.setAttribute("aria-pressed", other === button));
  studies.forEach((study, place) => { study.root.hidden = String(place) !== button.dataset.show; study.render(); });
}));
const redraw = () => studies.forEach(study => study.render());
document.querySelectorAll(".compare table").forEach(sortable);
document.querySelector("button.theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("(max-width: 639px)").addEventListener("change", redraw);
const paper = (width, theme, all) => {
  printed = width;
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  studies.forEach(study => study.render(all));
};
window.addEventListener("beforeprint", () => {
  const before = document.documentElement.dataset.theme;
  paper(PRINTED, "light", true);
  window.addEventListener("afterprint", () => paper(0, before, false), {once: true});
});
document.documentElement.dataset.ready = "yes";
