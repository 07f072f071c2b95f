/** The map of KV pages: a square for each page, which glows for a moment when its state changes. */

import { h } from "./dom.js";

/** The states, in the order of octavo.kv.page_map.PageState. Colors: light, dark (after Okabe and Ito's palette). */
export const STATES = [
  { name: "Free", what: "free", colors: ["#e9e6e0", "#25282e"] },
  {
    name: "Cached",
    what: "cached: nobody uses it, but a prompt that begins alike will",
    colors: ["#b3bfd2", "#4a566d"],
  },
  { name: "In use", what: "in use by one request", colors: ["#56a5e6", "#4a93dc"] },
  { name: "Shared", what: "shared", colors: ["#2464c8", "#a9d2ff"] },
  { name: "Pinned", what: "pinned by a KV state", colors: ["#e69f00", "#f0a92a"] },
  { name: "Loading", what: "being loaded from a lower tier", colors: ["#c9458f", "#e784bb"] },
  { name: "Saving", what: "being saved to a lower tier", colors: ["#009e73", "#2fbf93"] },
];
export const SHARED = 3;
const MOST_SHARED = ["#08255c", "#f2f9ff"]; // of pages with 31 references or more
const FLASH = ["#16305f", "#ffffff"]; // towards which a page glows
const DIMMED = 0.12; // opacity of the states that are not chosen in the legend
const GLOW = 700; // ms
const MAX_HEIGHT = 440; // CSS pixels
const MAX_CELL = 18;

/** Return the state of a page's byte: its index in STATES. */
export const stateOf = (byte) => byte & 7;

/** Return the number of references of a page's byte; 31 stands for more, too. */
export const referencesOf = (byte) => byte >> 3;

/** Count the pages by state. */
export function countStates(pages) {
  const counts = new Array(STATES.length).fill(0);
  const bytes = new Uint32Array(256);
  for (let i = 0; i < pages.length; i++) bytes[pages[i]]++;
  bytes.forEach((number, byte) => {
    counts[Math.min(stateOf(byte), STATES.length - 1)] += number;
  });
  return counts;
}

/** Say what a page is. */
export function describe(byte) {
  const references = referencesOf(byte);
  const number = references >= 31 ? "31 or more" : String(references);
  return stateOf(byte) === SHARED ? `shared by ${number} requests` : STATES[stateOf(byte)].what;
}

/** The map. `element` is the element to add to the page; set the pages with `update`. */
export class PageMap {
  /** @param {string} label What the map shows, for screen readers. */
  constructor(label) {
    this.label = label;
    this.pages = new Uint8Array(0);
    this.glow = new Float32Array(0); // of each page: 1 when it changes, then less
    this.chosen = null; // the state that the legend shows alone
    this.cell = 1;
    this.columns = 1;
    this.frame = 0;
    this.last = 0;
    this.picked = -1;
    this.pixels = document.createElement("canvas"); // a pixel for each page
    this.canvas = h("canvas", {
      tabindex: "0",
      role: "img",
      keydown: (event) => this.#onKey(event),
      pointermove: (event) => this.#pick(this.#pageAt(event)),
      pointerleave: () => this.#pick(-1),
      blur: () => this.#pick(-1),
    });
    this.marker = h("div.marker", { hidden: true });
    this.tip = h("div.tip", { hidden: true, role: "status" });
    this.element = h("div.map", {}, this.canvas, this.marker, this.tip);
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.recolor = () => {
      this.#setColors();
      this.#layout();
    };
    addEventListener("themechange", this.recolor);
    this.observer = new ResizeObserver(() => this.#layout());
    this.observer.observe(this.element);
    this.#setColors();
  }

  /** Stop drawing. */
  close() {
    removeEventListener("themechange", this.recolor);
    this.observer.disconnect();
    cancelAnimationFrame(this.frame);
  }

  /** Show the states of the pages. @param {Uint8Array} pages A byte for each. */
  update(pages) {
    const before = this.pages;
    this.pages = pages;
    if (before.length !== pages.length) {
      this.glow = new Float32Array(pages.length);
      this.#layout();
    } else if (!this.calm.matches) {
      for (let i = 0; i < pages.length; i++) if (pages[i] !== before[i]) this.glow[i] = 1;
    }
    this.#draw();
    if (this.picked >= 0) this.#pick(this.picked);
  }

  /** Show one state alone; null shows all. */
  choose(state) {
    this.chosen = state;
    this.#setColors();
    this.#draw();
  }

  #setColors() {
    const theme = getComputedStyle(this.element.isConnected ? this.element : document.documentElement);
    const dark =
      (document.documentElement.dataset.theme ??
        (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    this.theme = theme;
    const k = dark ? 1 : 0;
    this.flash = rgb(FLASH[k]);
    this.colors = new Uint32Array(256);
    for (let byte = 0; byte < 256; byte++) {
      const state = Math.min(stateOf(byte), STATES.length - 1);
      let color = rgb(STATES[state].colors[k]);
      if (state === SHARED)
        color = mix(color, rgb(MOST_SHARED[k]), Math.min(1, Math.log2(Math.max(2, referencesOf(byte)) / 2) / 4));
      const alpha = this.chosen === null || this.chosen === state ? 255 : 255 * DIMMED;
      this.colors[byte] = packed(color, alpha);
    }
  }

  /** Choose the size of the squares. */
  #layout() {
    const { width } = this.element.getBoundingClientRect();
    const n = this.pages.length;
    if (!width || !n) return;
    const scale = devicePixelRatio || 1;
    const [w, most] = [Math.floor(width * scale), MAX_HEIGHT * scale];
    this.cell = Math.max(1, Math.min(Math.round(MAX_CELL * scale), Math.floor(Math.sqrt((w * most) / n))));
    while (this.cell > 1 && Math.ceil(n / Math.floor(w / this.cell)) * this.cell > most) this.cell--;
    this.columns = Math.floor(w / this.cell);
    const rows = Math.ceil(n / this.columns);
    Object.assign(this.canvas, { width: this.columns * this.cell, height: rows * this.cell });
    this.canvas.style.width = `${(this.columns * this.cell) / scale}px`;
    this.canvas.style.height = `${(rows * this.cell) / scale}px`;
    Object.assign(this.pixels, { width: this.columns, height: rows });
    this.image = new ImageData(this.columns, rows);
    this.words = new Uint32Array(this.image.data.buffer);
    this.stencil = this.cell >= 4 ? this.#makeStencil(scale) : null;
    this.#draw();
  }

  /** Make the pattern that leaves a gap between squares and rounds their corners. */
  #makeStencil(scale) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = this.cell;
    const context = tile.getContext("2d");
    const gap = this.cell >= 8 * scale ? Math.max(1, Math.round(this.cell / 8)) : 1;
    context.beginPath();
    context.roundRect(0, 0, this.cell - gap, this.cell - gap, Math.min(3 * scale, this.cell / 5));
    context.fill();
    return this.canvas.getContext("2d").createPattern(tile, "repeat");
  }

  #draw() {
    this.frame ||= requestAnimationFrame((now) => this.#paint(now));
  }

  #paint(now) {
    this.frame = 0;
    if (!this.words) return;
    const fade = Math.min(0.25, (now - this.last) / GLOW);
    this.last = now;
    if (this.#fill(fade)) this.#draw();
    this.pixels.getContext("2d").putImageData(this.image, 0, 0);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.globalCompositeOperation = "copy";
    context.drawImage(this.pixels, 0, 0, this.canvas.width, this.canvas.height);
    if (!this.stencil) return;
    context.globalCompositeOperation = "destination-in";
    context.fillStyle = this.stencil;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** Write the pixel of each page. Return whether some still glow. */
  #fill(fade) {
    const { pages, glow, words, colors, flash } = this;
    let glows = false;
    for (let i = 0; i < pages.length; i++) {
      const color = colors[pages[i]];
      const g = glow[i];
      if (g <= 0) {
        words[i] = color;
        continue;
      }
      const part = 0.7 * g * g;
      const red = (color & 255) + (flash[0] - (color & 255)) * part;
      const green = ((color >> 8) & 255) + (flash[1] - ((color >> 8) & 255)) * part;
      const blue = ((color >> 16) & 255) + (flash[2] - ((color >> 16) & 255)) * part;
      words[i] = (color & 0xff000000) | (blue << 16) | (green << 8) | red;
      glow[i] = g - fade;
      glows = true;
    }
    return glows;
  }

  // What a page is

  #pageAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = devicePixelRatio || 1;
    const column = Math.floor(((event.clientX - box.left) * scale) / this.cell);
    const row = Math.floor(((event.clientY - box.top) * scale) / this.cell);
    const page = row * this.columns + column;
    return column >= 0 && column < this.columns && page < this.pages.length ? page : -1;
  }

  #onKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.#pick(Math.max(0, Math.min(this.pages.length - 1, this.picked < 0 ? 0 : this.picked + step)));
  }

  #pick(page) {
    this.picked = page;
    this.marker.hidden = this.tip.hidden = page < 0;
    if (page < 0) return;
    const scale = devicePixelRatio || 1;
    const size = Math.max(this.cell / scale, 5);
    const x = ((page % this.columns) * this.cell) / scale;
    const y = (Math.floor(page / this.columns) * this.cell) / scale;
    Object.assign(this.marker.style, {
      left: `${x - 2}px`,
      top: `${y - 2}px`,
      width: `${size + 3}px`,
      height: `${size + 3}px`,
    });
    this.tip.replaceChildren(
      h("b", {}, `Page ${page.toLocaleString("en")}`),
      h("span", {}, describe(this.pages[page])),
    );
    const { width } = this.tip.getBoundingClientRect();
    const most = this.element.clientWidth - width;
    Object.assign(this.tip.style, { left: `${Math.max(0, Math.min(x - 20, most))}px`, top: `${y + size + 10}px` });
  }
}

/** Return the color of a state in the current theme. */
export function colorOf(state) {
  const [light, dark] = STATES[state].colors;
  return `light-dark(${light}, ${dark})`;
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function mix(from, to, part) {
  return from.map((each, i) => Math.round(each + (to[i] - each) * part));
}

function packed([red, green, blue], alpha) {
  return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
