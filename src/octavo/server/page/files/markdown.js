/**
 * Markdown as DOM nodes. Text of a model is never parsed as HTML; links have only the schemes http, https and mailto;
 * images are shown as links, so that nothing is loaded from elsewhere.
 */

import { h, iconButton, toast } from "./dom.js";
import { highlighted } from "./highlight.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const MAX_GROWING = 6000; // characters of code that gets its colors while it grows
const MAX_DEPTH = 10; // of quotes and lists in each other

/** Where the text of a text node begins in the source. */
const offsets = new WeakMap();

/** Return where a character of a rendered text node stands in the source; -1 for text that is not from the source. */
export function sourceOffset(node, index) {
  const start = offsets.get(node);
  return start === undefined ? -1 : start + index;
}

/** Return the address of a link if it may be followed, else null. */
export function safeAddress(address) {
  const clean = address.replace(/[\u0000-\u0020\u007f]/g, "");
  if (!/^(https?:\/\/|mailto:)/i.test(clean)) return null;
  try {
    return new URL(clean).href;
  } catch {
    return null;
  }
}

/** Render a whole text. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  for (const block of blocks(linesOf(text, 0))) fragment.append(block.build());
  return fragment;
}

/** Renders a text that grows at its end. Only the last block is made anew. */
export class GrowingMarkdown {
  constructor(element) {
    this.element = element;
    this.begin = 0; // of the last block, in the source
    this.last = [];
  }

  /** Show `text`, which begins as the text before. */
  update(text) {
    const found = blocks(linesOf(text, this.begin));
    for (const node of this.last) node.remove();
    const nodes = found.map((block) => block.build());
    this.element.append(...nodes);
    if (found.length) this.begin = found.at(-1).at;
    this.last = nodes.slice(-1);
  }
}

// Blocks. A line is its text, and where that begins in the source.

function linesOf(text, begin) {
  const lines = [];
  for (let at = begin; at <= text.length;) {
    const end = text.indexOf("\n", at);
    const line = text.slice(at, end < 0 ? text.length : end);
    lines.push({ text: line.replace(/\r$/, "").replace(/\t/g, " "), at });
    at = end < 0 ? text.length + 1 : end + 1;
  }
  return lines;
}

function cut({ text, at }, length) {
  return { text: text.slice(length), at: at + length };
}

function blocks(lines, depth = 0) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    if (!lines[i].text.trim()) {
      i++;
      continue;
    }
    const [end, build] = block(lines, i, depth);
    found.push({ at: lines[i].at, build });
    i = end;
  }
  return found;
}

/** Return the line after the block that begins at line i, and a function that makes the block's node. */
function block(lines, i, depth) {
  const { text } = lines[i];
  let match;
  if ((match = FENCE.exec(text))) return fence(lines, i, match);
  if ((match = HEADING.exec(text))) {
    const line = cut(lines[i], match[0].length);
    const title = { text: line.text.trimEnd().replace(/ #+$/, ""), at: line.at };
    return [i + 1, () => h(`h${Math.min(match[1].length + 1, 6)}`, {}, inline([title]))];
  }
  if (isRule(text)) return [i + 1, () => h("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(text)) return quote(lines, i, depth);
  if (depth < MAX_DEPTH && ITEM.test(text)) return list(lines, i, depth);
  if (text.includes("|") && lines[i + 1] && isTableRule(lines[i + 1])) return table(lines, i);
  return paragraph(lines, i, depth);
}

function isRule(text) {
  return /^ {0,3}[-*_]/.test(text) && /^(-{3,}|\*{3,}|_{3,})$/.test(text.replaceAll(" ", ""));
}

function isTableRule(line) {
  return /^[ |:-]+$/.test(line.text) && cells(line).every(({ text }) => /^:?-+:?$/.test(text));
}

function paragraph(lines, i, depth) {
  let end = i + 1;
  while (end < lines.length && lines[end].text.trim() && !interrupts(lines[end].text, depth)) end++;
  const own = lines.slice(i, end).map((line) => cut(line, /^ */.exec(line.text)[0].length));
  return [end, () => h("p", {}, inline(own))];
}

function interrupts(text, depth) {
  if (FENCE.test(text) || HEADING.test(text) || isRule(text)) return true;
  if (depth >= MAX_DEPTH) return false;
  return QUOTE.test(text) || (ITEM.test(text) && !/^ *\d+[.)]/.test(text)) || /^ {0,3}1[.)] /.test(text);
}

function fence(lines, i, [, mark, info]) {
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = i + 1;
  while (end < lines.length && !closing.test(lines[end].text)) end++;
  const closed = end < lines.length;
  const own = lines.slice(i + 1, end);
  const language = info.trim().split(/\s+/)[0];
  return [closed ? end + 1 : end, () => codeBlock(own, language, closed)];
}

function codeBlock(lines, language, closed) {
  const text = lines.map((line) => line.text).join("\n");
  const code = h("code", {});
  // Long code gets its colors once it is complete, so that drawing it while it grows costs little.
  const hasColors = closed || text.length < MAX_GROWING;
  for (const { kind, text: part, at } of highlighted(text, hasColors ? language : "")) {
    const node = document.createTextNode(part);
    if (lines.length) offsets.set(node, lines[0].at + at);
    code.append(kind ? h(`span.${kind}`, {}, node) : node);
  }
  const copy = iconButton("copy", "Copy the code", () => copyText(text));
  return h("figure.code", {}, h("figcaption", {}, h("span", {}, language || "text"), copy), h("pre", {}, code));
}

/** Put a text into the clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    toast("The browser does not allow it to copy here");
  }
}

function quote(lines, i, depth) {
  let end = i;
  const own = [];
  while (end < lines.length && lines[end].text.trim()) {
    const match = QUOTE.exec(lines[end].text);
    if (!match && interrupts(lines[end].text, depth)) break;
    own.push(cut(lines[end++], match?.[0].length ?? 0));
  }
  return [end, () => h("blockquote", {}, ...blocks(own, depth + 1).map((each) => each.build()))];
}

function list(lines, i, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[i].text)[2]);
  const items = [];
  let end = i;
  let loose = false;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end].text);
    if (!match || /\d/.test(match[2]) !== ordered || isRule(lines[end].text)) break;
    const width =
      match[0].length > match[1].length + match[2].length + 4
        ? match[1].length + match[2].length + 1
        : match[0].length + (match[3] ? 0 : 1);
    const own = [cut(lines[end++], Math.min(width, match[0].length))];
    let blank = 0;
    while (end < lines.length) {
      const { text } = lines[end];
      const indent = /^ */.exec(text)[0].length;
      if (!text.trim()) blank++;
      else if (indent >= Math.min(width, 2) && (indent >= width || !ITEM.test(text) || indent >= match[1].length + 2)) {
        own.push(...Array(blank).fill({ text: "", at: lines[end].at }));
        loose ||= blank > 0 && indent < width + 4;
        blank = 0;
        own.push(cut(lines[end], Math.min(indent, width)));
      } else if (blank || ITEM.test(text) || interrupts(text, depth)) break;
      else own.push(lines[end]);
      end++;
    }
    items.push(own);
    if (blank && ITEM.test(lines[end]?.text ?? "")) loose ||= blank > 1;
  }
  const start = ordered ? parseInt(ITEM.exec(lines[i].text)[2], 10) : 1;
  return [
    end,
    () =>
      h(
        ordered ? "ol" : "ul",
        { start: start === 1 ? null : String(start) },
        ...items.map((own) => item(blocks(own, depth + 1), loose)),
      ),
  ];
}

function item(found, loose) {
  const element = h("li");
  for (const each of found) {
    const node = each.build();
    if (node.nodeName === "P" && !loose) element.append(...node.childNodes);
    else element.append(node);
  }
  const first = element.firstChild;
  if (first?.nodeType === 3 && /^\[[ xX]\] /.test(first.data)) {
    const box = h("input", { type: "checkbox", disabled: true, checked: first.data[1] !== " " });
    offsets.set(first, (offsets.get(first) ?? 0) + 4);
    first.data = first.data.slice(4);
    element.prepend(box, " ");
  }
  return element;
}

function table(lines, i) {
  let end = i + 2;
  while (end < lines.length && lines[end].text.includes("|")) end++;
  const sides = cells(lines[i + 1]).map(({ text }) => {
    const [left, right] = [text.startsWith(":"), text.endsWith(":")];
    return left && right ? "center" : right ? "right" : "left";
  });
  const row = (line, tag) =>
    h(
      "tr",
      {},
      ...cells(line)
        .slice(0, sides.length)
        .map((cell, k) => h(`${tag}.${sides[k]}`, {}, inline([cell]))),
    );
  return [
    end,
    () =>
      h(
        "div.table",
        {},
        h(
          "table",
          {},
          h("thead", {}, row(lines[i], "th")),
          h("tbody", {}, ...lines.slice(i + 2, end).map((line) => row(line, "td"))),
        ),
      ),
  ];
}

function cells({ text, at }) {
  const found = [];
  let start = /^\s*\|?/.exec(text)[0].length;
  const stop = text.trimEnd().replace(/\|$/, "").length;
  for (let k = start; k <= stop; k++) {
    if (k < stop && (text[k] !== "|" || text[k - 1] === "\\")) continue;
    const raw = text.slice(start, k);
    const left = /^\s*/.exec(raw)[0].length;
    found.push({ text: raw.trim(), at: at + start + left });
    start = k + 1;
  }
  return found;
}

// Inline text

const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const LABEL = String.raw`\[((?:[^[\]\\\n]|\\.|\[[^[\]\n]*\]){0,1000})\]`;
const TARGET = String.raw`<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?`;
const LINK = new RegExp(String.raw`^${LABEL}\(\s*${TARGET}(?:\s+["'][^"'\n]*["'])?\s*\)`);
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const WORD = /[\p{L}\p{N}]/u;

/** Return a fragment with the inline contents of lines. */
function inline(lines) {
  const text = lines.map((line) => line.text).join("\n");
  const starts = [];
  let position = 0;
  for (const line of lines) {
    starts.push([position, line.at - position]);
    position += line.text.length + 1;
  }
  return new Inline(text, starts).parse(0, text.length, 0);
}

class Inline {
  constructor(text, starts) {
    this.text = text;
    this.starts = starts; // of each line: its position in `text`, and what to add for the position in the source
    this.unclosed = new Map(); // by marker: from where on no closing one follows
  }

  parse(begin, end, depth) {
    const fragment = document.createDocumentFragment();
    let plain = begin;
    let at = begin;
    const flush = (to) => this.#addText(fragment, plain, to);
    while (at < end) {
      SPECIAL.lastIndex = at;
      const match = SPECIAL.exec(this.text);
      if (!match || match.index >= end) break;
      at = match.index;
      const found = this.#special(at, end, depth);
      if (found) {
        flush(found.from ?? at);
        fragment.append(...found.nodes);
        plain = at = found.to;
      } else at += match[0].length > 1 ? match[0].length : this.#run(at, end);
    }
    flush(end);
    return fragment;
  }

  /** Add the text from `begin` to `end`, a node per line, each of which is a piece of the source. */
  #addText(fragment, begin, end) {
    for (let at = begin; at < end;) {
      const line = this.#lineAt(at);
      const next = this.text.indexOf("\n", at);
      const to = next < 0 || next >= end ? end : next + 1;
      const node = document.createTextNode(this.text.slice(at, to));
      offsets.set(node, at + line[1]);
      fragment.append(node);
      at = to;
    }
  }

  /** Return the entry of `starts` for a position. */
  #lineAt(at) {
    let [low, high] = [0, this.starts.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle][0] <= at) low = middle;
      else high = middle - 1;
    }
    return this.starts[low];
  }

  /** Return the length of the run of equal characters at a position. */
  #run(at, end) {
    let to = at + 1;
    while (to < end && this.text[to] === this.text[at] && "*_~`".includes(this.text[at])) to++;
    return to - at;
  }

  #special(at, end, depth) {
    const { text } = this;
    switch (text[at]) {
      case "\\":
        return this.#escape(at, end);
      case "`":
        return this.#code(at, end);
      case "*":
      case "_":
      case "~":
        return depth < 12 ? this.#emphasis(at, end, depth) : null;
      case "!":
      case "[":
        return this.#link(at, end, depth);
      case "<":
        return this.#angle(at, end);
      case "\n":
        return / {2}$/.test(text.slice(at - 2, at)) ? { nodes: [h("br")], to: at + 1 } : null;
      default:
        return this.#bareAddress(at, end);
    }
  }

  #escape(at, end) {
    const next = this.text[at + 1];
    if (at + 1 >= end) return null;
    if (next === "\n") return { nodes: [h("br")], to: at + 2 };
    return PUNCTUATION.test(next) ? { nodes: this.#texts(at + 1, at + 2), to: at + 2 } : null;
  }

  #texts(begin, end) {
    const fragment = document.createDocumentFragment();
    this.#addText(fragment, begin, end);
    return [...fragment.childNodes];
  }

  #code(at, end) {
    const length = this.#run(at, end);
    const close = this.#closing("`".repeat(length), at + length, end, (to) => this.text[to - 1] !== "`");
    return close < 0 ? null : { nodes: [h("code", {}, ...this.#texts(at + length, close))], to: close + length };
  }

  #emphasis(at, end, depth) {
    const run = this.#run(at, end);
    const mark = this.text[at];
    if (SPACE.test(this.text[at + run] ?? " ") || (mark === "~" && run !== 2)) return null;
    if (mark === "_" && WORD.test(this.text[at - 1] ?? "")) return null;
    const length = Math.min(run, run === 3 ? 3 : 2);
    const marker = mark.repeat(length);
    const begin = at + run;
    const close = this.#closing(
      marker,
      begin,
      end,
      (to) =>
        !SPACE.test(this.text[to - 1]) &&
        !(mark === "_" && WORD.test(this.text[to + length] ?? "")) &&
        this.text[to - 1] !== "\\",
    );
    if (close < 0 || run > 3) return null;
    const inner = this.parse(begin, close, depth + 1);
    const node =
      mark === "~"
        ? h("del", {}, inner)
        : length === 3
          ? h("em", {}, h("strong", {}, inner))
          : h(length === 2 ? "strong" : "em", {}, inner);
    return { nodes: [node], to: close + length };
  }

  /** Return the position of the run that closes `marker`; -1 if there is none. */
  #closing(marker, begin, end, fits) {
    const known = this.unclosed.get(marker);
    if (known !== undefined && begin >= known.from && end <= known.end) return -1;
    for (let to = this.text.indexOf(marker, begin); to >= 0 && to + marker.length <= end;) {
      const run = this.#run(to, end);
      if (run === marker.length && to > begin && fits(to)) return to;
      to = this.text.indexOf(marker, to + run);
    }
    this.unclosed.set(marker, { from: begin, end });
    return -1;
  }

  #link(at, end, depth) {
    const open = this.text[at] === "!" ? at + 1 : at;
    if (this.text[open] !== "[" || depth > 11) return null;
    const match = LINK.exec(this.text.slice(open, Math.min(end, open + 4000)));
    if (!match) return null;
    const inner = this.parse(open + 1, open + 1 + match[1].length, depth + 12);
    return { nodes: [anchor(match[2], inner)], to: open + match[0].length };
  }

  #angle(at, end) {
    const match = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/.exec(this.text.slice(at, Math.min(end, at + 2000)));
    return (
      match && {
        nodes: [anchor(match[1], ...this.#texts(at + 1, at + 1 + match[1].length))],
        to: at + match[0].length,
      }
    );
  }

  #bareAddress(at, end) {
    if (WORD.test(this.text[at - 1] ?? "")) return null;
    let [address] = /^https?:\/\/[^\s<>"'`]*/.exec(this.text.slice(at, Math.min(end, at + 2000)));
    address = address.replace(/[.,:;!?*_~)\]]+$/, "");
    return address.length < 9
      ? null
      : { nodes: [anchor(address, ...this.#texts(at, at + address.length))], to: at + address.length };
  }
}

function anchor(address, ...children) {
  const href = safeAddress(address);
  if (!href) return h("span", { title: `This link is not followed: ${address}` }, ...children);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href }, ...children);
}
