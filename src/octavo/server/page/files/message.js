/** One message of a conversation, as it is shown. */

import { h, iconButton } from "./dom.js";
import { copyText, GrowingMarkdown, render, sourceOffset } from "./markdown.js";
import { showAlternatives, tokenAt, tokenView } from "./probabilities.js";

/** The view of a message. `actions` are retry() and edit(text). */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = h(`article.message.${message.role}`, {
      "aria-label": message.role === "user" ? "You" : "Answer",
    });
    this.draw();
  }

  /** Draw the message as it is. */
  draw() {
    this.growing = null;
    const { role } = this.message;
    this.element.classList.remove("growing");
    this.element.replaceChildren(...(role === "user" ? this.#question() : this.#answer()));
  }

  #question() {
    const { content } = this.message;
    return [
      h("div.text", {}, content),
      h(
        "div.actions",
        {},
        iconButton("edit", "Edit", () => this.beginEdit()),
        iconButton("copy", "Copy", () => copyText(content)),
      ),
    ];
  }

  #answer() {
    const { message } = this;
    this.body = h("div.markdown", { click: (event) => this.#clicked(event) }, render(message.content));
    return [this.#reasoning(), this.body, this.#error(), this.#actions()].filter(Boolean);
  }

  #reasoning() {
    const { reasoning } = this.message;
    return reasoning
      ? h("details.reasoning", {}, h("summary", {}, "Reasoning"), h("div.markdown", {}, render(reasoning)))
      : null;
  }

  #error() {
    const { error } = this.message;
    return error ? h("p.error", { role: "alert" }, error) : null;
  }

  #actions() {
    const { message } = this;
    const has = message.tokens?.length > 0;
    const toggle =
      has && iconButton("bars", "Probabilities of the tokens", () => this.#toggleTokens(), { "aria-pressed": "false" });
    this.toggle = toggle;
    return h(
      "div.actions",
      {},
      iconButton("copy", "Copy", () => copyText(message.content)),
      iconButton("retry", "Retry", () => this.actions.retry()),
      toggle,
      h("span.facts", {}, facts(message)),
    );
  }

  #toggleTokens() {
    const pressed = this.toggle.getAttribute("aria-pressed") !== "true";
    this.toggle.setAttribute("aria-pressed", String(pressed));
    const choose = (token, element) => showAlternatives(token, element.getBoundingClientRect(), element);
    this.body.replaceChildren(pressed ? tokenView(this.message.tokens, choose) : render(this.message.content));
  }

  /** Show the alternatives of the word that was clicked. */
  #clicked(event) {
    const { tokens, content } = this.message;
    if (!tokens?.length || event.target.closest("a, button, figcaption") || !getSelection().isCollapsed) return;
    const caret = caretAt(event.clientX, event.clientY);
    if (caret?.node.nodeType !== Node.TEXT_NODE) return;
    let index = caret.index; // between two characters: that one is meant on which the pointer is
    const range = document.createRange();
    const box = (i) => {
      range.setStart(caret.node, i);
      range.setEnd(caret.node, i + 1);
      return range.getBoundingClientRect();
    };
    if (index > 0 && (index >= caret.node.length || event.clientX < box(index).left)) index--;
    const rectangle = box(index);
    if (event.clientX > rectangle.right + 3 || event.clientX < rectangle.left - 3) return;
    const token = tokenAt(tokens, content, sourceOffset(caret.node, index));
    if (token) showAlternatives(token, rectangle, this.toggle);
  }

  /** Begin to show an answer that grows. */
  grow() {
    this.element.classList.add("growing");
    this.body = h("div.markdown");
    this.growing = new GrowingMarkdown(this.body);
    this.element.replaceChildren(this.body);
    this.update();
  }

  /** Show what has been added. */
  update() {
    const { reasoning, content } = this.message;
    if (!this.growing) return;
    if (reasoning && !this.thoughts?.isConnected) {
      this.thoughtsBody = h("div.markdown");
      this.thoughts = h("details.reasoning", {}, h("summary", {}, "Reasoning"), this.thoughtsBody);
      this.growingThoughts = new GrowingMarkdown(this.thoughtsBody);
      this.element.prepend(this.thoughts);
    }
    if (reasoning && !content) this.growingThoughts.update(reasoning);
    if (content) this.growing.update(content);
  }

  /** Replace the text by a box in which it can be changed. */
  beginEdit() {
    const { content } = this.message;
    const input = h("textarea", {
      rows: String(Math.min(12, content.split("\n").length + 1)),
      "aria-label": "Edit the message",
    });
    const send = () => input.value.trim() && this.actions.edit(input.value.trim());
    const cancel = () => this.draw();
    input.value = content;
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    this.element.replaceChildren(
      h(
        "div.edit",
        {},
        input,
        h(
          "div.actions",
          {},
          h("button", { type: "button", click: cancel }, "Cancel"),
          h("button.primary", { type: "button", click: send }, "Send"),
        ),
      ),
    );
    input.focus();
    input.setSelectionRange(content.length, content.length);
  }
}

function caretAt(x, y) {
  if (document.caretPositionFromPoint) {
    const found = document.caretPositionFromPoint(x, y);
    return found && { node: found.offsetNode, index: found.offset };
  }
  const found = document.caretRangeFromPoint?.(x, y);
  return found && { node: found.startContainer, index: found.startOffset };
}

/** Return a line about an answer: its length, speed and end. */
function facts({ usage, times, finish, model }) {
  const parts = [model];
  if (usage) parts.push(`${usage.answer} tokens`);
  if (times) parts.push(`${(times.first / 1000).toFixed(2)} s to the first`);
  if (usage && times && usage.answer > 1)
    parts.push(`${((usage.answer - 1) / (times.rest / 1000)).toFixed(0)} tokens/s`);
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut at the limit of tokens");
  return parts.filter(Boolean).join(" · ");
}
