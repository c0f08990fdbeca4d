// Draws the charts of a run report with uPlot, from the JSON in the page. Nothing is fetched.
"use strict";
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const shown = runs.map(() => true);
  let smoothing = 0;
  let drawn = [];
  let zooming = false;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seriesColour = (number) => colour(`--c${number % 8}`);
  // An evaluation has a colour of its own: of one run another one, of several the darker or lighter shade of the run's.
  const evaluationColour = (run) => (runs.length === 1 ? colour("--evaluation") : colour(`--e${run % 8}`));
  const figure = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return Number(value.toPrecision(4)).toExponential();
    return value.toLocaleString("en", { maximumSignificantDigits: 6 });
  };
  const bytes = (value) => {
    if (value === null || value === undefined) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (Math.abs(value) >= 1024 && unit < 4) { value /= 1024; unit += 1; }
    return `${unit ? Number(value.toPrecision(4)) : value} ${units[unit]}`;
  };
  const powers = Array.from({ length: 60 }, (_, power) => 2 ** power);  // ticks of an axis in bytes
  const formats = { number: figure, bytes, bytes_per_s: (v) => `${bytes(v)}/s`, percent: (v) => `${figure(v)} %`,
    seconds: (v) => `${figure(v)} s`, celsius: (v) => `${figure(v)} °C` };

  // Exponential moving average without the pull of its first value.
  const smooth = (values) => {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = smoothing * sum + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return sum / weight;
    });
  };

  const nearest = (u, index, hovered) => {
    const values = u.data[index];
    if (index === 0 || hovered === null || values[hovered] != null) return hovered;
    for (let away = 1; away < values.length; away += 1) {
      if (values[hovered - away] != null) return hovered - away;
      if (values[hovered + away] != null) return hovered + away;
    }
    return hovered;
  };

  const marksOf = (chart) => chart.series.map((s) => s.run).filter((run, i, all) => shown[run] && all.indexOf(run) === i)
    .flatMap((run) => runs[run].marks.map((mark) => ({ ...mark, run })));

  class Chart {
    constructor(spec, host) {
      Object.assign(this, { spec, host, log: Boolean(spec.log) });
      const head = document.createElement("div");
      head.className = "head";
      const title = document.createElement("h3");
      title.textContent = spec.title;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "log";
      button.title = "logarithmic axis";
      button.addEventListener("click", () => { this.log = !this.log; this.draw(); });
      this.button = button;
      head.append(title, button);
      this.plot = document.createElement("div");
      this.legend = document.createElement("div");
      this.legend.className = "legend";
      host.append(head, this.plot, this.legend);
      this.draw();
    }

    data() {
      const tables = this.series.map(({ run, group, column }) => {
        const { x, columns } = runs[run].groups[group];
        let values = columns[column];
        if (smoothing && this.spec.smooth) values = smooth(values);
        if (this.log) values = values.map((value) => (value > 0 ? value : null));
        return [x, values];
      });
      if (!tables.length) return [[], []];
      return tables.length > 1 ? uPlot.join(tables) : tables[0];
    }

    draw() {
      const bounds = this.u ? { min: this.u.scales.x.min, max: this.u.scales.x.max } : null;
      if (this.u) this.u.destroy();
      this.series = this.spec.series.filter((s) => shown[s.run]);
      this.button.setAttribute("aria-pressed", String(this.log));
      this.marks = marksOf({ series: this.series });
      this.format = formats[this.spec.format] || figure;
      const evaluated = (s) => s.evaluation || (s.group === "eval" && runs.length === 1);
      const paint = (s, i) => (evaluated(s) ? evaluationColour(s.run) : seriesColour(this.spec.byRun ? s.run : i));
      const tables = this.data();
      const lone = (i) => tables[i + 1].filter((value) => value != null).length === 1;  // no line to be seen
      const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 },
        ticks: { stroke: colour("--line"), width: 1 }, font: "11px system-ui, sans-serif" };
      const shorten = { number: (v) => figure(v).replace(/,000$/, "k") }[this.spec.format] || this.format;
      // The room that the longest label of the axis needs, so that none is cut.
      const widest = (u, labels) => {
        u.ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
        return 18 + Math.max(30, ...(labels ?? []).map((label) => u.ctx.measureText(label).width / devicePixelRatio));
      };
      this.tip = document.createElement("div");
      this.tip.className = "tip";
      this.u = new uPlot({
        width: Math.max(200, this.plot.clientWidth),
        height: 250,
        scales: { x: { time: false }, y: { distr: this.log ? 3 : 1 } },
        series: [{}, ...this.series.map((s, i) => ({
          label: s.label, stroke: paint(s, i), width: s.evaluation ? 2 : 1.5, dash: s.evaluation ? [6, 4] : undefined,
          spanGaps: true,
          paths: s.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
          points: s.points || s.evaluation || lone(i) ? { show: true, size: lone(i) ? 8 : 5, fill: paint(s, i) } : { show: false },
        }))],
        axes: [{ ...axis, size: 32 }, { ...axis, size: widest, incrs: this.format === bytes ? powers : undefined,
          values: (u, splits) => splits.map((v) => (v === null ? "" : shorten(v))) }],
        legend: { show: false },
        cursor: { drag: { x: true, y: false }, focus: { prox: 1e6 }, sync: { key: "lumina", scales: ["x", null] },
          dataIdx: nearest },
        focus: { alpha: this.series.length > 8 ? 0.25 : 1 },
        hooks: { draw: [(u) => this.drawMarks(u)], setCursor: [(u) => this.point(u)],
          setScale: [(u, key) => key === "x" && zoom(this, u)] },
      }, tables, this.plot);
      this.u.over.append(this.tip);
      if (bounds && bounds.min !== null && zoomed) this.u.setScale("x", bounds);
      this.legend.replaceChildren(...(this.series.length > 12 ? [] : this.series.map((s, i) => {
        const item = document.createElement("span");
        const chip = document.createElement("span");
        chip.className = s.evaluation ? "chip dashed" : "chip";
        chip.style.background = chip.style.color = paint(s, i);
        item.append(chip, s.label);
        return item;
      })));
    }

    drawMarks(u) {
      const { ctx, bbox } = u;
      ctx.save();
      for (const mark of this.marks) {
        const x = Math.round(u.valToPos(mark.step, "x", true));
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.strokeStyle = ctx.fillStyle = colour(`--${mark.level}`);
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash(mark.level === "start" ? [2, 4] : [5, 3]);
        ctx.globalAlpha = 0.6;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.globalAlpha = 1;
        ctx.beginPath();
        ctx.arc(x, bbox.top + 3 * devicePixelRatio, 3 * devicePixelRatio, 0, 2 * Math.PI);
        ctx.fill();
      }
      ctx.restore();
    }

    // The tooltip: each curve's value beside the pointer, and the events that it is close to.
    point(u) {
      const { left, top, idx, idxs } = u.cursor;
      if (left < 0 || idx === null || idx === undefined || !this.host.matches(":hover, .hovered")) {
        this.tip.style.display = "none";
        return;
      }
      const rows = [];
      const row = (strong, rest, kind) => {
        const line = document.createElement("div");
        const bold = document.createElement("b");
        bold.textContent = strong;
        if (kind) line.className = kind;
        line.append(bold, rest);
        rows.push(line);
      };
      row(`step ${figure(u.data[0][idx])}`, "");
      let curves = this.series.map((s, i) => ({ s, value: u.data[i + 1][idxs[i + 1]] }));
      if (curves.length > 12) {
        const height = (value) => (value == null ? Infinity : Math.abs(u.valToPos(value, "y") - top));
        curves = curves.sort((a, b) => height(a.value) - height(b.value)).slice(0, 5);
      }
      for (const { s, value } of curves) row(this.format(value), ` ${s.label}`);
      for (const mark of this.marks) {
        if (Math.abs(u.valToPos(mark.step, "x") - left) > 7) continue;
        if (rows.length > 20) break;
        row(`${mark.step} `, (runs.length > 1 ? `${runs[mark.run].name}: ` : "") + mark.text, mark.level);
      }
      this.tip.replaceChildren(...rows);
      this.tip.style.display = "block";
      const width = this.tip.offsetWidth, room = u.over.clientWidth;
      this.tip.style.left = `${Math.max(0, left + 14 + width > room ? left - width - 14 : left + 14)}px`;
      this.tip.style.top = `${Math.max(0, Math.min(top + 10, u.over.clientHeight - this.tip.offsetHeight))}px`;
    }
  }

  // One chart's zoom is every chart's.
  let zoomed = false;
  const zoom = (from, u) => {
    if (zooming || u.status !== 1) return;
    zooming = true;
    const { min, max } = u.scales.x;
    const xs = u.data[0];
    zoomed = !(min <= xs[0] && max >= xs[xs.length - 1]);
    for (const chart of drawn) if (chart !== from && chart.u) resize(chart, min, max);
    zooming = false;
  };
  const resize = (chart, min, max) => {
    const xs = chart.u.data[0];
    if (!xs.length) return;
    chart.u.setScale("x", zoomed ? { min, max } : { min: xs[0], max: xs[xs.length - 1] });
  };
  const redraw = () => drawn.forEach((chart) => chart.draw());

  for (const section of document.querySelectorAll("[data-section]")) {
    for (const spec of charts.filter((chart) => chart.section === section.dataset.section)) {
      const host = document.createElement("div");
      host.className = "chart";
      host.dataset.title = spec.title;
      section.append(host);
      drawn.push(new Chart(spec, host));
    }
  }
  const widths = new ResizeObserver((entries) => entries.forEach((entry) => {
    const chart = drawn.find((one) => one.plot === entry.target);
    const width = Math.max(200, entry.contentRect.width);
    if (chart && Math.abs(chart.u.width - width) > 1) chart.u.setSize({ width, height: 250 });
  }));
  drawn.forEach((chart) => widths.observe(chart.plot));

  for (const box of document.querySelectorAll("[data-run]")) {
    box.addEventListener("change", () => { shown[Number(box.dataset.run)] = box.checked; redraw(); });
  }
  document.getElementById("smoothing").addEventListener("change", (event) => {
    smoothing = Number(event.target.value);
    redraw();
  });
  document.getElementById("reset").addEventListener("click", () => { zoomed = false; redraw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
