/** The probabilities of an answer's tokens: what else the model might have written. */

import { h } from "./dom.js";

const encoder = new TextEncoder();

/**
 * A token of an answer.
 * @typedef {{text: string, size: number, logprob: number, top: {text: string, logprob: number}[]}} Token
 */

/** Convert the entries of `logprobs.content` of a chat completion. @returns {Token[]} */
export function tokensOf(content) {
  return content.map(({ token, bytes, logprob, top_logprobs: top }) => ({
    text: token,
    size: bytes ? bytes.length : encoder.encode(token).length,
    logprob,
    top: top.map((each) => ({ text: each.token, logprob: each.logprob })),
  }));
}

/** Return the token that has the character at `offset` of an answer's text; undefined if none has. */
export function tokenAt(tokens, text, offset) {
  const bytes = encoder.encode(text);
  const wanted = encoder.encode(text.slice(0, offset)).length;
  let position = 0;
  for (const token of tokens) {
    if (!isAt(bytes, position, token)) continue; // a special token, which is not in the text
    if (wanted < position + token.size) return token;
    position += token.size;
  }
  return undefined;
}

function isAt(bytes, position, { text, size }) {
  if (position + size > bytes.length) return false;
  if (text.includes("\ufffd")) return true; // a part of a character
  return encoder.encode(text).every((byte, i) => bytes[position + i] === byte);
}

/** Make the view of an answer in which every token has the color of its probability and can be chosen. */
export function tokenView(tokens, choose) {
  const box = h("div.tokens", { role: "group", "aria-label": "Tokens; choose one with the arrow keys and Enter" });
  tokens.forEach((token, i) => {
    const chance = Math.exp(token.logprob);
    const level = chance > 0.9 ? 0 : chance > 0.6 ? 1 : chance > 0.3 ? 2 : chance > 0.1 ? 3 : 4;
    box.append(
      h(
        `button.token.p${level}`,
        {
          type: "button",
          tabindex: i ? "-1" : "0",
          title: percent(chance),
          click: (event) => choose(token, event.currentTarget),
        },
        visible(token.text),
      ),
    );
    if (token.text.includes("\n")) box.append(h("br"));
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.matches(".token")) return;
    const all = [...box.querySelectorAll(".token")];
    const next = all[all.indexOf(event.target) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return box;
}

let open = null;

/** Show a token's alternatives as bars, beside a rectangle of the window. */
export function showAlternatives(token, rectangle, returnFocus) {
  closeAlternatives();
  const rows = token.top.some((each) => each.text === token.text) ? token.top : [token, ...token.top];
  const rest = Math.max(0, 1 - rows.reduce((sum, each) => sum + Math.exp(each.logprob), 0));
  const bar = (text, chance, kind) => {
    const fill = h("span.fill");
    fill.style.width = `${Math.max(1.5, 100 * chance)}%`;
    return h(`li${kind}`, {}, h("code", {}, text), h("span.bar", {}, fill), h("span.percent", {}, percent(chance)));
  };
  const chosen = (each) => (each.text === token.text ? ".chosen" : "");
  const box = h(
    "div.alternatives",
    { role: "dialog", "aria-label": `Alternatives to ${token.text}`, tabindex: "-1" },
    h(
      "ol",
      {},
      ...rows.map((each) => bar(visible(each.text), Math.exp(each.logprob), chosen(each))),
      rest > 0.0005 && bar("others", rest, ".rest"),
    ),
  );
  document.body.append(box);
  const { width, height } = box.getBoundingClientRect();
  const below = rectangle.bottom + 8 + height < innerHeight;
  box.style.left = `${Math.max(8, Math.min(rectangle.left - 12, innerWidth - width - 8))}px`;
  box.style.top = `${below ? rectangle.bottom + 8 : Math.max(8, rectangle.top - height - 8)}px`;
  open = { box, returnFocus };
  box.focus({ preventScroll: true });
}

/** Close the alternatives. Return whether they were open. */
export function closeAlternatives() {
  if (!open) return false;
  const { box, returnFocus } = open;
  open = null;
  const hadFocus = box.contains(document.activeElement);
  box.remove();
  if (hadFocus) returnFocus?.focus({ preventScroll: true });
  return true;
}

addEventListener("pointerdown", (event) => open && !open.box.contains(event.target) && closeAlternatives());
addEventListener("scroll", () => closeAlternatives(), true);

function visible(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "·") || "∅";
}

function percent(chance) {
  return chance >= 0.9995
    ? "100 %"
    : chance >= 0.1
      ? `${(100 * chance).toFixed(1)} %`
      : chance >= 0.0001
        ? `${(100 * chance).toFixed(2)} %`
        : "< 0.01 %";
}
