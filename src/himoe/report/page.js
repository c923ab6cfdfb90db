"use strict";
(function () {
  const root = document.documentElement;
  const charts = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Set();
  const coarse = matchMedia("(pointer: coarse)").matches;

  // Colours: "--name" is a variable of the style sheet, "ramp:0.3" a place on the ramp of layers.
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function colour(text) {
    if (text.startsWith("--")) return css(text);
    if (!text.startsWith("ramp:")) return text;
    const at = parseFloat(text.slice(5)) * 2;
    const [a, b] = at < 1 ? ["--ramp-first", "--ramp-middle"] : ["--ramp-middle", "--ramp-last"];
    const [from, to] = [channels(css(a)), channels(css(b))];
    const share = at < 1 ? at : at - 1;
    return `rgb(${from.map((v, i) => Math.round(v + (to[i] - v) * share)).join(",")})`;
  }
  function painted(value, key) {
    if (typeof value === "string") return /color/.test(key) ? colour(value) : value;
    if (Array.isArray(value)) return key === "x" || key === "y" || key === "z" ? value : value.map((v) => painted(v, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
    }
    return value;
  }

  function axis(own) {
    const title = own && own.title && own.title.text ? { text: own.title.text, standoff: 8, font: { color: "--muted", size: 12 } } : undefined;
    return {
      color: "--muted", gridcolor: "--grid", zeroline: false, linecolor: "--grid", ticks: "", automargin: true, nticks: 6,
      fixedrange: coarse, ...own, title,
    };
  }
  // On paper a chart cannot follow its box, so it is told the width.
  function layout(own, box) {
    return painted({
      font: { family: css("--font"), size: 12, color: "--muted" },
      paper_bgcolor: "--surface", plot_bgcolor: "--surface",
      margin: { l: 8, r: 20, t: 10, b: 8 }, hovermode: "x unified", dragmode: coarse ? false : "zoom", autosize: true, width: "print" in root.dataset ? box.clientWidth : undefined,
      hoverlabel: { bgcolor: "--raised", bordercolor: "--grid", font: { color: "--ink", size: 12 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal", font: { color: "--ink", size: 12 } },
      ...own, xaxis: axis(own.xaxis), yaxis: axis({ exponentformat: "power", ...own.yaxis }),
    }, "layout");
  }
  const options = { displayModeBar: false, responsive: true };
  function draw(id) {
    drawn.add(id);
    return Plotly.react(id, painted(charts[id].traces, "data"), layout(charts[id].layout, document.getElementById(id)), options);
  }
  function redraw() { drawn.forEach(draw); }

  // A chart is drawn when it comes near the window: a report may hold a hundred.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target.id); }
    }
  }, { rootMargin: "600px" });
  Object.keys(charts).forEach((id) => watcher.observe(document.getElementById(id)));

  for (const button of document.querySelectorAll("button[data-axis]")) {
    button.addEventListener("click", () => {
      const own = charts[button.dataset.chart].layout;
      const key = button.dataset.axis;
      const log = !(own[key] && own[key].type === "log");
      own[key] = { ...own[key], type: log ? "log" : "linear", dtick: log && key === "xaxis" ? "D2" : undefined };
      button.setAttribute("aria-pressed", String(log));
      draw(button.dataset.chart);
    });
  }

  for (const button of document.querySelectorAll("button[data-save]")) {
    button.addEventListener("click", () => {
      const box = document.getElementById(button.dataset.save);
      const size = { width: box.clientWidth, height: box.clientHeight, scale: 2 };
      Plotly.downloadImage(box, { format: "png", filename: button.dataset.name, ...size });
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    document.querySelectorAll("details").forEach((details) => { details.open = true; });
    Object.keys(charts).forEach((id) => { watcher.unobserve(document.getElementById(id)); draw(id); });
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    redraw();
  });
})();
