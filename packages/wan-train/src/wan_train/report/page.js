"use strict";
// What comes from logs, captions and configurations is put into elements as text. Plotly reads markup in the names that
// it shows, so it is given escaped ones.
(() => {
  const COLORS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#e08214", "#17a2a2", "#8c564b", "#c51b8a"];
  const DASHES = ["solid", "dot", "dash", "longdash", "dashdot", "longdashdot"];
  const MARKS = { save: "#bbbbbb", resume: "#d62728", other: "#555555" };
  const MOST_LINES = 200; // of saves in a chart
  const FEW_POINTS = 40; // which are drawn as points too
  const SECONDS = 2;
  // Only these buttons: plotly has others, which hand data to its makers' site.
  const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];

  const byId = (id) => document.getElementById(id);
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const color = (number) => COLORS[number % COLORS.length];
  let content = JSON.parse(byId("content").textContent);

  function element(tag, text, properties) {
    const made = Object.assign(document.createElement(tag), properties || {});
    if (text !== undefined && text !== null) made.textContent = text;
    return made;
  }

  function fill(table, head, rows) {
    const cells = (tag, values) => {
      const row = element("tr");
      row.append(
        ...values.map((value) => {
          if (value instanceof HTMLTableCellElement) return value;
          const cell = element(tag);
          cell.append(value === null || value === undefined ? "" : value);
          return cell;
        }),
      );
      return row;
    };
    table.replaceChildren(...(head ? [cells("th", head)] : []), ...rows.map((row) => cells("td", row)));
  }

  const number = (value, digits) =>
    value === null || value === undefined
      ? "-"
      : value.toLocaleString("en-US", { maximumSignificantDigits: digits || 5 });

  const whole = (value) => number(value, 16);

  function nameOf(run, index) {
    const name = element("span");
    name.append(element("span", "", { className: "swatch" }), run.name);
    name.firstChild.style.background = color(index);
    return name;
  }

  // -- curves ---------------------------------------------------------------------------------------------------------

  /** The place of a step on the chosen horizontal axis. */
  function position(run, step) {
    const axis = byId("axis").value;
    if (axis === "step") return step;
    const steps = run.clock.step;
    const values = run.clock[axis];
    let low = 0;
    let high = steps.length - 1;
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    return values[low] + ((values[high] - values[low]) * (step - steps[low])) / (steps[high] - steps[low]);
  }

  function labelOf(key) {
    if (key === "validation.loss") return "mean";
    if (key.startsWith("validation.timesteps.")) return "t = " + key.slice("validation.timesteps.".length);
    return key;
  }

  function line(run, curve, chart, properties) {
    return {
      type: "scatter",
      mode: curve.step.length > FEW_POINTS ? "lines" : "lines+markers",
      marker: { size: 4 },
      x: curve.step.map((step) => position(run, step)),
      y: curve.value.map((value) => (value === null ? null : value * chart.scale)),
      ...properties,
    };
  }

  function tracesOf(chart) {
    const several = content.runs.length > 1;
    const traces = [];
    content.runs.forEach((run, index) => {
      chart.keys.forEach((key, place) => {
        const curve = run.curves[key];
        if (!curve) return;
        const parts = [...(several ? [run.name] : []), ...(several && chart.keys.length === 1 ? [] : [labelOf(key)])];
        const name = escaped(parts.join(", "));
        const drawn = { color: color(several ? index : place), width: key === "validation.loss" ? 2.5 : 1.5 };
        if (several) drawn.dash = DASHES[place % DASHES.length];
        const smoothed = chart.smoothed ? run.smoothed[byId("smoothing").value] : undefined;
        if (!smoothed) {
          traces.push(line(run, curve, chart, { name, line: drawn }));
          return;
        }
        const group = { legendgroup: name };
        traces.push(line(run, curve, chart, { ...group, name, line: drawn, opacity: 0.3, showlegend: false }));
        const smooth = { ...group, mode: "lines", name: name + ", smoothed", line: { ...drawn, width: 2.2 } };
        traces.push(line(run, smoothed, chart, smooth));
      });
    });
    return traces;
  }

  function marksOf() {
    const shapes = [];
    const annotations = [];
    for (const run of content.runs) {
      let saves = run.marks.filter((mark) => mark.kind === "save" && mark.step !== null);
      if (!byId("saves").checked) saves = [];
      const others = run.marks.filter((mark) => mark.kind !== "save" && mark.step !== null);
      for (const mark of [...saves.slice(-MOST_LINES), ...(byId("resumes").checked ? others : [])]) {
        const x = position(run, mark.step);
        const style = { color: MARKS[mark.kind], width: 1, dash: mark.kind === "save" ? "dot" : "solid" };
        shapes.push({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: style, layer: "below" });
        if (mark.kind === "save") continue;
        const text = escaped(mark.kind === "resume" ? "resume" : mark.text.split(" ")[0].slice(0, 20));
        const font = { size: 10, color: MARKS[mark.kind] };
        annotations.push({ x, y: 1, yref: "paper", text, showarrow: false, xanchor: "left", yanchor: "top", font });
      }
    }
    return { shapes, annotations };
  }

  function drawCharts() {
    const places = byId("charts");
    while (places.children.length > content.charts.length) {
      Plotly.purge(places.lastChild);
      places.lastChild.remove();
    }
    while (places.children.length < content.charts.length) places.append(element("div", "", { className: "chart" }));
    const axis = byId("axis");
    const marks = marksOf();
    const config = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: BUTTONS };
    content.charts.forEach((chart, index) => {
      const traces = tracesOf(chart);
      const layout = {
        title: { text: escaped(chart.title), font: { size: 14 }, x: 0.02, y: 0.97 },
        margin: { l: 58, r: 12, t: 32, b: 40 },
        font: { family: "system-ui, sans-serif", size: 11 },
        hovermode: "x unified",
        showlegend: traces.length > 1,
        legend: { orientation: "h", y: -0.2, yanchor: "top" },
        xaxis: { title: { text: axis.selectedOptions[0].textContent, standoff: 4 }, zeroline: false },
        yaxis: { title: { text: chart.unit, standoff: 4 }, zeroline: false },
        uirevision: axis.value,
        ...marks,
      };
      const values = new Set(traces.flatMap((trace) => trace.y).filter((value) => value !== null));
      if (chart.logarithmic) layout.yaxis.type = "log";
      // Plotly would draw a constant learning rate between -1 and 1.
      else if (values.size === 1 && !values.has(0)) layout.yaxis.range = [0, 2 * [...values][0]].sort((a, b) => a - b);
      Plotly.react(places.children[index], traces, layout, config);
    });
    byId("absent").textContent = content.absent.length ? `Not in the log: ${content.absent.join(", ")}.` : "";
  }

  function offerSmoothing() {
    const choice = byId("smoothing");
    const before = choice.value;
    const lives = [...new Set(content.runs.flatMap((run) => Object.keys(run.smoothed).map(Number)))].sort((a, b) => a - b);
    const options = lives.map((steps) => element("option", `half-life of ${steps} steps`, { value: String(steps) }));
    choice.replaceChildren(element("option", "none", { value: "" }), ...options);
    const last = Math.max(0, ...content.runs.map((run) => run.step));
    const suits = lives.filter((steps) => steps <= last / 25).pop() || lives[0] || "";
    const kept = before !== "" || choice.dataset.chosen ? before : String(suits);
    choice.value = [...choice.options].some((option) => option.value === kept) ? kept : String(suits);
  }

  // -- tables and videos ----------------------------------------------------------------------------------------------

  function drawRuns() {
    const head = ["run", "step", "validation loss", "tokens", "training time", "saves", "resumes", "folder"];
    const rows = content.runs.map((run, index) => [
      nameOf(run, index),
      run.steps === null ? whole(run.step) : `${whole(run.step)} of ${whole(run.steps)}`,
      number(run.validation),
      number(run.tokens, 4),
      run.time,
      whole(run.saves),
      whole(run.resumes),
      run.folder,
    ]);
    fill(byId("runs"), head, rows);
    const several = content.runs.length > 1;
    const notes = content.runs.flatMap((run) => run.notes.map((note) => (several ? `${run.name}: ${note}` : note)));
    byId("notes").replaceChildren(...[...notes, ...content.notes].map((note) => element("li", note)));
  }

  let videosDrawn = "";
  function drawVideos() {
    const { steps, rows } = content.videos;
    byId("videos").hidden = !rows.length;
    const key = JSON.stringify(content.videos);
    if (key === videosDrawn) return; // they may be playing
    videosDrawn = key;
    const cells = rows.map((row) => {
      const caption = element("td", undefined, { className: "caption" });
      caption.append(row.caption || row.name);
      if (row.seed !== null) caption.append(element("br"), element("small", `seed ${row.seed}`));
      if (content.runs.length > 1) caption.append(element("br"), nameOf(content.runs[row.run], row.run));
      const properties = { muted: true, loop: true, controls: true, playsInline: true, preload: "metadata" };
      const shown = ([type, src]) =>
        type.startsWith("image/")
          ? element("img", undefined, { alt: row.caption || row.name, src })
          : element("video", undefined, { ...properties, src });
      return [caption, ...row.sources.map((source) => (source === null ? "" : shown(source)))];
    });
    fill(byId("videos").querySelector("table"), ["", ...steps.map((step) => `step ${step}`)], cells);
    byId("play").hidden = !byId("videos").querySelector("video"); // pictures of single frames do not play
  }

  function drawSettings() {
    const names = content.runs.map((run, index) => nameOf(run, index));
    const differing = content.settings.filter((row) => row.differs);
    byId("differences").hidden = content.runs.length < 2 || !content.runs.every((run) => run.settings_from !== null);
    fill(
      byId("differences").querySelector("table"),
      ["key", ...names],
      differing.length ? differing.map((row) => [row.key, ...row.values]) : [["they do not differ"]],
    );
    byId("settings").hidden = !content.settings.length;
    const part = byId("filter").value.trim().toLowerCase();
    fill(
      byId("settings").querySelector("table"),
      ["key", ...content.runs.map((run) => `${run.name}, ${run.settings_from || "no configuration"}`)],
      content.settings.filter((row) => row.key.toLowerCase().includes(part)).map((row) => [row.key, ...row.values]),
    );
  }

  function drawEvents() {
    const rows = content.runs.flatMap((run, index) =>
      run.marks.map((mark) => [nameOf(run, index), mark.step === null ? "-" : String(mark.step), mark.kind, mark.text]),
    );
    byId("events").hidden = !rows.length;
    fill(byId("events").querySelector("table"), ["run", "step", "what", ""], rows);
  }

  function draw() {
    drawRuns();
    offerSmoothing();
    drawCharts();
    drawVideos();
    drawSettings();
    drawEvents();
  }

  // -- events ---------------------------------------------------------------------------------------------------------

  byId("choices").addEventListener("submit", (event) => event.preventDefault());
  byId("smoothing").addEventListener("change", (event) => (event.target.dataset.chosen = "yes"));
  for (const id of ["axis", "smoothing", "saves", "resumes"]) byId(id).addEventListener("change", drawCharts);
  byId("filter").addEventListener("input", drawSettings);
  byId("play").addEventListener("click", () => {
    for (const video of document.querySelectorAll("video")) {
      video.currentTime = 0;
      video.play();
    }
  });

  const say = (text) => Object.assign(byId("state"), { hidden: false, textContent: text });

  /** Ask the server of --follow for what is new, now and then. */
  async function follow() {
    const begun = Date.now();
    try {
      const response = await fetch(`content.json?have=${content.version}`, { cache: "no-store" });
      if (response.status === 200) {
        content = await response.json();
        draw();
      }
      say(response.ok ? `Following the run; last change at ${content.time}.` : await response.text());
    } catch {
      say("wan-train report --follow does not answer any more; this is the last that was read.");
    }
    // A log of hundreds of thousands of entries takes seconds.
    setTimeout(follow, Math.max(SECONDS * 1000, 5 * (Date.now() - begun)));
  }

  draw();
  if (content.follow) follow();
})();
