"use strict";
// Draws the charts in the page's data by plotly, as the reader selects. Tables and text work without this script.

const PIXELS = 1.8;  // per point of a figure on paper
const ROW = 140;  // pixels per inch of the height of a row of panels
const BELOW = 62, ABOVE = 34, TOP = 46;  // pixels around a row of panels: ticks and label, title; the buttons on top
const GAP = 0.03;  // between columns, of the width
const PRINTED = 960;  // pixels: a landscape sheet, A4 or letter
// plotly's default buttons include one that sends the data to its maker.
const BUTTONS = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];
const STROKES = ["x-thin", "y-down", "line-ns"];  // symbols without an area
let DATA = null;
let printed = 0;  // width of the charts while the page prints, else 0

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const theme = () => css("--paper") === "#fff" ? "light" : "dark";
const narrow = () => window.innerWidth < 640;
const unique = values => [...new Set(values)];
const each = (value, change) => Array.isArray(value) ? value.map(change) : change(value);
const html = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("\n", "<br>");

function color(word) {
  const [scale, position] = word.split(" "), colors = DATA.scales[scale]?.[theme()];
  if (colors) return colors[Math.round(position * (colors.length - 1))];
  return {ink: css("--ink"), faint: css("--faint")}[word] ?? word;
}

function axis({label = "", scale = "linear", range}, more) {
  const scales = {
    rate: {type: "log", tickvals: Object.values(DATA.rates), ticktext: Object.keys(DATA.rates)},
    log: {type: "log", tickformat: "~g"},
    count: {tick0: 0},
    bands: {showgrid: false},
  };
  return {title: {text: html(label), standoff: 8}, gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false,
    automargin: true, ...(range && {range}), ...scales[scale], ...more};
}

function trace(marks, more) {
  const {x, y, symbol = "", dash, size = 4, width = 1.2, opacity = 1, hollow, label = "", text, hover} = marks;
  const ink = each(marks.color ?? "ink", color), stroke = STROKES.includes(symbol);
  const base = {x: x ?? [null], y: y ?? [null], opacity, name: html(label), legendgroup: marks.run || marks.arm || label, ...more};
  if (marks.bar) return {...base, type: "bar", orientation: "h", marker: {color: ink}, hovertemplate: "%{x:.2f}<extra></extra>"};
  return {
    ...base, mode: [dash && "lines", symbol && "markers", text && "text"].filter(Boolean).join("+"),
    line: {color: each(ink, String), dash, width: width * 1.4},
    marker: {
      color: ink, size: size * PIXELS * (text && narrow() ? 1.1 : text ? 1.5 : 1),
      symbol: each(symbol, word => STROKES.includes(word) || hollow ? `${word}-open` : word),
      line: {width: stroke ? 2.4 : text ? 1 : hollow ? 1.5 : 0, color: text ? "#444" : ink},
    },
    text, textfont: {size: narrow() ? 7 : 9, color: "#000"}, hovertext: hover?.map(html),
    ...(hover ? {hoverinfo: "text"} : label ? {hovertemplate: `%{x}: %{y:.4g}<extra>${html(label)}</extra>`} : {hoverinfo: "skip"}),
  };
}

// Reference lines and the title of a panel.
function decorations(panel, id) {
  const shapes = [], annotations = [], small = {size: 10, color: css("--faint")};
  for (const {axis, at, label} of panel.rules ?? []) {
    const other = axis === "x" ? "y" : "x";
    const ends = {[`${axis}0`]: at, [`${axis}1`]: at, [`${other}0`]: 0, [`${other}1`]: 1};
    const refs = {[`${axis}ref`]: `${axis}${id}`, [`${other}ref`]: `${other}${id} domain`};
    shapes.push({type: "line", ...ends, ...refs, line: {dash: "dot", width: 1.4, color: css("--faint")}});
    if (label) annotations.push({text: label, ...refs, x: 1, xanchor: "right", y: at, yanchor: "bottom", showarrow: false, font: small});
  }
  if (panel.title) {
    const text = panel.color ? `<b>${html(panel.title)}</b>` : html(panel.title), font = {size: 12, color: color(panel.color ?? "ink")};
    const refs = {xref: `x${id} domain`, yref: `y${id} domain`};
    annotations.push({text, ...refs, x: 0, xanchor: "left", y: 1, yanchor: "bottom", showarrow: false, font});
  }
  return {shapes, annotations};
}

// Draw a chart: the panels that have marks to show, in as many columns as there is room for.
function draw(place, chart, hidden, shown) {
  const panels = chart.panels.map(panel => ({...panel, marks: panel.marks.filter(shown)})).filter(panel => panel.marks.length);
  if (!panels.length) return note(place, "No data to show for this selection.");
  const columns = Math.min(narrow() ? 1 : chart.columns ?? 1, panels.length), rows = Math.ceil(panels.length / columns);
  const names = panels.flatMap(panel => panel.y.bands ?? []), gone = names.filter(name => hidden.has(name)).length;
  const row = ROW * (chart.row_height ?? 2.6) * (names.length ? 1 - gone / names.length : 1);
  const high = rows * row + (rows - 1) * (ABOVE + BELOW);
  const widths = (columns > 1 && chart.widths) || Array(columns).fill(1), sum = numbers => numbers.reduce((a, b) => a + b, 0);
  const unit = (1 - GAP * (columns - 1)) / sum(widths.slice(0, columns));
  const values = panels.flatMap(panel => panel.marks.flatMap(marks => marks.y ?? [])).filter(value => value > 0);
  const decades = Math.log10(Math.max(...values) / Math.min(...values)), layers = Math.max(...panels[0].marks[0].x ?? []);
  const steps = {log: {dtick: decades < 1.5 ? "D2" : Math.ceil(decades / 8)}, count: {dtick: Math.ceil(layers / 12)}};
  const traces = [], seen = new Set(), first = {}, layout = {shapes: [], annotations: []};
  const add = (marks, legend, more) => {
    const showlegend = Boolean(marks.label) && !seen.has(legend + marks.label);
    seen.add(legend + marks.label);
    traces.push(trace(marks, {showlegend, legend, ...more}));
  };
  panels.forEach((panel, index) => {
    const id = index ? index + 1 : "", column = index % columns, top = 1 - Math.floor(index / columns) * (row + ABOVE + BELOW) / high;
    const left = unit * sum(widths.slice(0, column)) + GAP * column, right = left + unit * widths[column];
    const share = (name, word) => word && (first[name + word] ??= `${name}${id}`) !== `${name}${id}` ? {matches: first[name + word]} : {};
    const inner = column > 0 && panel.y.share ? {showticklabels: false, title: undefined} : {};
    const bands = panel.y.bands ?? [], kept = bands.filter(band => !hidden.has(band));
    const shift = y => y + bands.slice(0, Math.round(-y)).filter(band => hidden.has(band)).length;  // a hidden band leaves no gap
    const ticks = bands.length && {tickvals: kept.map((_, band) => -band), ticktext: kept.map(html), range: [0.5 - kept.length, 0.5]};
    layout[`xaxis${id}`] = axis(panel.x, {domain: [left, right], anchor: `y${id}`, ...steps[panel.x.scale], ...share("x", panel.x.share)});
    layout[`yaxis${id}`] = axis(panel.y, {
      domain: [Math.max(0, top - row / high), top], anchor: `x${id}`, ...steps[panel.y.scale], ...share("y", panel.y.share), ...ticks, ...inner,
    });
    const legend = panel.legend ? `legend${index + 2}` : "legend", paper = `${css("--paper").padEnd(7, "f")}c0`;
    if (panel.legend) layout[legend] = {x: right, xanchor: "right", y: top, yanchor: "top", font: {size: 10}, tracegroupgap: 0, bgcolor: paper};
    for (const marks of panel.marks) {
      add(bands.length ? {...marks, y: marks.y?.map(shift)} : marks, legend, {xaxis: `x${id}`, yaxis: `y${id}`});
    }
    for (const [kind, items] of Object.entries(decorations(panel, id))) layout[kind].push(...items);
  });
  for (const marks of (chart.legend ?? []).filter(shown)) add(marks, "legend");
  const labels = traces.filter(entry => entry.showlegend && entry.legend === "legend").map(entry => 45 + 7 * entry.name.length);
  const below = BELOW + 22 * Math.ceil(sum(labels) / Math.max(200, (printed || place.clientWidth) - 120));
  Plotly.react(place, traces, {
    ...layout, height: TOP + high + below, margin: {l: 55, r: 12, t: TOP, b: below}, ...(printed && {width: printed}),
    legend: {orientation: "h", x: 0, y: -(BELOW - 8) / high, yanchor: "top", maxheight: 4000}, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: css("--ink"), family: "inherit", size: 12},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--ink")},
  }, {
    responsive: true, displaylogo: false, displayModeBar: narrow() || printed ? false : "hover", modeBarButtons: [BUTTONS],
    toImageButtonOptions: {format: "svg"},
  });
}

function note(place, sentence) {
  Plotly.purge(place);
  const paragraph = document.createElement("p");
  paragraph.className = "note";
  paragraph.textContent = sentence;
  place.replaceChildren(paragraph);
}

class Study {
  constructor(root, data) {
    Object.assign(this, {root, data, hidden: new Set(), hiddenRuns: new Set()});
    this.tabs = [...root.querySelectorAll("[role=tab]")];
    this.tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => this.open(tab));
      tab.addEventListener("keydown", event => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], next = step && this.tabs.at((place + step) % this.tabs.length);
        if (next) { next.focus(); this.open(next); }
      });
    });
    const toggles = (selector, name, set) => root.querySelectorAll(selector).forEach(box => box.addEventListener("change", () => {
      if (box.checked) set.delete(box.dataset[name]); else set.add(box.dataset[name]);
      root.querySelectorAll("[data-arm]").forEach(row => { row.hidden = this.hidden.has(row.dataset.arm); });
      this.render();
    }));
    toggles("[data-variant]", "variant", this.hidden);
    toggles("[data-run]", "run", this.hiddenRuns);
    root.querySelectorAll("[data-inspect]").forEach(button => button.addEventListener("click", () => this.inspect(button.dataset.inspect)));
    root.querySelectorAll(".controls select").forEach(box => box.addEventListener("change", () => { this.offerLayers(); this.render(); }));
    root.querySelectorAll("table").forEach(sortable);
    if (this.control("layer")) this.offerLayers();
    this.open(this.tabs[0]);
  }

  open(tab) {
    for (const other of this.tabs) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
    }
    this.render();
  }

  render(all = false) {
    if (this.root.hidden && !all) return;
    const shown = marks => !this.hidden.has(marks.arm) && !this.hiddenRuns.has(marks.run);
    for (const place of this.root.querySelectorAll("[data-plot]")) {
      const name = place.dataset.plot, chart = this.data.charts[name];
      if (all || !place.closest("[role=tabpanel]").hidden) draw(place, chart ?? this[name](), this.hidden, chart ? shown : () => true);
    }
  }

  control(name) { return this.root.querySelector(`[data-control=${name}]`); }
  key() { return this.control("statistic").value.replace("{site}", this.control("site").value); }
  sides() { return unique([this.control("left").value, this.control("right").value]); }

  // Show a run, listed in a table, beside the one that is selected.
  inspect(run) {
    this.control(this.data.runs[run].diverged ? "right" : "left").value = run;
    this.open(this.tabs.find(tab => tab.dataset.panel === "inside"));
    this.root.querySelectorAll("tr[data-id]").forEach(row => row.classList.toggle("picked", row.dataset.id === run));
    this.root.querySelector("[data-panel=inside]").focus();
  }

  offerLayers() {
    const box = this.control("layer"), old = box.value;
    const count = Math.max(0, ...this.sides().map(run => this.data.runs[run].series[this.key()]?.v.length ?? 0));
    box.replaceChildren(new Option("all", "all"), ...Array.from({length: count}, (_, layer) => new Option(`layer ${layer}`, layer)));
    box.value = [...box.options].some(option => option.value === old) ? old : "all";
    this.control("site").disabled = !this.control("statistic").value.includes("{site}");
  }

  inside() {
    const only = this.control("layer").value, {title, log} = DATA.statistics[this.control("statistic").value];
    const label = this.control("site").disabled ? title : `${title}, ${this.control("site").value}`;
    const panels = this.sides().map(run => {
      const {title, first_bad_step: bad, series, axes} = this.data.runs[run], {s, v = []} = series[this.key()] ?? {};
      const marks = v.map((y, layer) => ({
        x: axes[s], y, dash: "solid", color: `depth ${layer / Math.max(1, v.length - 1)}`, label: v.length > 1 ? `layer ${layer}` : label,
      })).filter((_, layer) => only === "all" || only === String(layer));
      const rules = bad === null ? [] : [{axis: "x", at: bad}];
      return {title, x: {label: "step"}, y: {label, scale: log ? "log" : "linear", share: "y"}, rules, marks};
    });
    return {panels, columns: 2};
  }

  gradient_by_depth() {
    return {panels: this.sides().map(run => this.data.depth[run]).filter(Boolean), columns: 2};
  }
}

function sortable(table) {
  const heads = [...table.querySelectorAll("thead th")], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", value = row => row.cells[column].dataset.value;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows], numeric = rows.every(row => !Number.isNaN(Number(value(row))));
    const order = (a, b) => numeric ? Number(a) - Number(b) : a.localeCompare(b);
    const empty = (a, b) => (value(a) === "") - (value(b) === "");
    rows.sort((a, b) => value(a) === "" || value(b) === "" ? empty(a, b) : (up ? 1 : -1) * order(value(a), value(b)));
    body.append(...rows);
  }));
}

// The text that an element holds, deflated, in base64.
async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}

async function start() {
  const library = document.createElement("script");
  library.textContent = await unpack("plotly");
  document.head.append(library);
  DATA = JSON.parse(await unpack("data"));
  const root = document.documentElement;
  const studies = [...document.querySelectorAll(".study")].map((part, place) => new Study(part, DATA.studies[place]));
  const redraw = (all = false) => studies.forEach(study => study.render(all === true));
  document.querySelectorAll("[data-show]").forEach(button => button.addEventListener("click", () => {
    document.querySelectorAll("[data-show]").forEach(other => other.setAttribute("aria-pressed", other === button));
    studies.forEach((study, place) => { study.root.hidden = String(place) !== button.dataset.show; });
    redraw();
  }));
  document.querySelectorAll(".compare table").forEach(sortable);
  document.querySelector("button.theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    redraw();
  });
  for (const query of ["(prefers-color-scheme: dark)", "(max-width: 639px)"]) matchMedia(query).addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    const before = root.dataset.theme;
    printed = PRINTED;
    root.dataset.theme = "light";
    redraw(true);
    window.addEventListener("afterprint", () => {
      printed = 0;
      if (before) root.dataset.theme = before; else delete root.dataset.theme;
      redraw();
    }, {once: true});
  });
  root.dataset.ready = "yes";
}

start().catch(error => {
  console.error(error);
  document.documentElement.dataset.ready = "failed";
  const sentence = "This browser cannot draw the charts. They are also saved in the directory figures.";
  document.querySelectorAll(".plot").forEach(place => { place.textContent = sentence; });
});
