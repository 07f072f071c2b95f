/** Small charts over time, on canvas. */

import { h } from "./dom.js";

const SECONDS = 120; // that a chart shows

/** Values over time: rows of one number (or null) per series. */
export class History {
  constructor() {
    this.rows = []; // [time, ...values]
  }

  add(time, values) {
    this.rows.push([time, ...values]);
    while (this.rows.length && this.rows[0][0] < time - SECONDS - 2) this.rows.shift();
  }
}

/**
 * A chart.
 * @param {Object} options
 * @param {string} options.label For screen readers.
 * @param {{name: string, color: string, dash?: boolean}[]} options.series Colors are CSS.
 * @param {(value: number) => string} options.format
 * @param {boolean} [options.stacked] Whether the series are parts of a whole.
 * @param {number} [options.most] The top of the scale; otherwise it follows the values.
 */
export class Chart {
  constructor({ label, series, format, stacked = false, most = null }) {
    Object.assign(this, { label, series, format, stacked, most });
    this.history = new History();
    this.canvas = h("canvas", {
      role: "img",
      "aria-label": label,
      pointermove: (event) => {
        this.pointer = event.offsetX;
        this.draw();
      },
      pointerleave: () => {
        this.pointer = null;
        this.draw();
      },
    });
    this.tip = h("div.tip", { hidden: true });
    this.element = h("div.chart", {}, this.canvas, this.tip);
    this.pointer = null;
    this.redraw = () => this.draw();
    addEventListener("themechange", this.redraw);
    this.observer = new ResizeObserver(this.redraw);
    this.observer.observe(this.element);
  }

  /** Stop drawing. */
  close() {
    removeEventListener("themechange", this.redraw);
    this.observer.disconnect();
  }

  /** Add the values of a moment, in seconds, and draw. */
  add(time, values) {
    this.history.add(time, values);
    this.canvas.setAttribute("aria-label", `${this.label}: ${this.#said(values)}`);
    this.draw();
  }

  #said(values) {
    return values
      .map((value, i) => `${this.series[i].name} ${value === null ? "unknown" : this.format(value)}`)
      .join(", ");
  }

  draw() {
    const { width, height } = this.element.getBoundingClientRect();
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const { rows } = this.history;
    this.#line(context, width, height);
    if (!rows.length) return;
    const end = rows.at(-1)[0];
    const top = this.most ?? (this.#highest(rows) || 1) * 1.12;
    const x = (time) => width - ((end - time) / SECONDS) * width;
    const y = (value) => height - 1.5 - (Math.min(value, top) / top) * (height - 5);
    if (this.stacked) this.#areas(context, rows, x, y);
    else this.series.forEach((series, i) => this.#curve(context, rows, i, x, y, height));
    this.#showPointer(context, rows, x, y, width, height);
  }

  #highest(rows) {
    return rows.reduce((most, [, ...values]) => Math.max(most, ...values.map((value) => value ?? 0)), 0);
  }

  #line(context, width, height) {
    context.strokeStyle = this.#color("var(--line)");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, height - 0.5);
    context.lineTo(width, height - 0.5);
    context.stroke();
  }

  #curve(context, rows, i, x, y, height) {
    const { color, dash } = this.series[i];
    context.strokeStyle = this.#color(color);
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    context.setLineDash(dash ? [3, 3] : []);
    const path = new Path2D();
    let first = null;
    let last = null;
    for (const [time, ...values] of rows) {
      if (values[i] === null) continue;
      if (last === null) path.moveTo(x(time), y(values[i]));
      else path.lineTo(x(time), y(values[i]));
      first ??= x(time);
      last = x(time);
    }
    context.stroke(path);
    context.setLineDash([]);
    if (i || first === null) return;
    path.lineTo(last, height);
    path.lineTo(first, height);
    context.globalAlpha = 0.12;
    context.fillStyle = context.strokeStyle;
    context.fill(path);
    context.globalAlpha = 1;
  }

  #areas(context, rows, x, y) {
    const below = rows.map(() => 0);
    this.series.forEach(({ color }, i) => {
      context.fillStyle = this.#color(color);
      context.beginPath();
      rows.forEach(([time], k) => context.lineTo(x(time), y(below[k])));
      for (let k = rows.length - 1; k >= 0; k--) {
        below[k] += rows[k][i + 1] ?? 0;
        context.lineTo(x(rows[k][0]), y(below[k]));
      }
      context.fill();
    });
  }

  #showPointer(context, rows, x, y, width, height) {
    this.tip.hidden = this.pointer === null;
    if (this.pointer === null) return;
    const row = rows.reduce((best, each) =>
      Math.abs(x(each[0]) - this.pointer) < Math.abs(x(best[0]) - this.pointer) ? each : best,
    );
    const at = x(row[0]);
    context.fillStyle = this.#color("var(--muted)");
    context.globalAlpha = 0.5;
    context.fillRect(Math.min(at, width - 1), 0, 1, height);
    context.globalAlpha = 1;
    const ago = Math.round(rows.at(-1)[0] - row[0]);
    const values = this.series.map(({ name }, i) =>
      h("span", {}, `${name} ${row[i + 1] === null ? "–" : this.format(row[i + 1])}`),
    );
    this.tip.replaceChildren(h("b", {}, ago ? `${ago} s ago` : "now"), ...values);
    this.tip.style.left = `${Math.max(0, Math.min(at - this.tip.offsetWidth / 2, width - this.tip.offsetWidth))}px`;
  }

  /** Resolve a CSS color, which may be a variable. */
  #color(color) {
    this.element.style.color = color;
    const resolved = getComputedStyle(this.element).color;
    this.element.style.color = "";
    return resolved;
  }
}

/**
 * Return the value below which a part of the counted values lies, interpolated in its bucket; null without values.
 * @param {number[]} bounds Upper bounds of the buckets; a last bucket has all above.
 * @param {number[]} counts
 * @param {number} part Such as 0.95.
 */
export function percentile(bounds, counts, part) {
  const total = counts.reduce((sum, each) => sum + each, 0);
  if (!total) return null;
  let left = part * total;
  for (let i = 0; i < counts.length; i++) {
    if (left <= counts[i] && counts[i]) {
      const from = i ? bounds[i - 1] : 0;
      return i < bounds.length ? from + (bounds[i] - from) * (left / counts[i]) : bounds.at(-1);
    }
    left -= counts[i];
  }
  return bounds.at(-1);
}
