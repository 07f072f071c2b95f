/** The chat: one conversation, its settings and its messages. */

import { ApiError, json, streamChat } from "./api.js";
import { Conversations } from "./conversations.js";
import { h, icon, iconButton, toast } from "./dom.js";
import { GrowingMarkdown, copyText, render, sourceOffset } from "./markdown.js";
import { closeAlternatives, showAlternatives, tokenAt, tokensOf, tokenView } from "./probabilities.js";
import { Settings, samplingBody } from "./settings.js";
import { Store } from "./store.js";

const ALTERNATIVES = 6; // top_logprobs
const NEAR = 80; // pixels from the end within which the list follows the answer
const SUGGESTIONS = [
  "Explain how a paged KV cache works, to someone who knows transformers.",
  "Write a Python function that merges overlapping intervals, with tests.",
  "Compare TCP and QUIC in a table.",
];

/** Start the chat in a section of the page. */
export async function start(section) {
  const store = await Store.open();
  await store.load();
  const chat = new Chat(section, store);
  await chat.loadModels();
  return chat;
}

class Chat {
  constructor(section, store) {
    this.store = store;
    this.runs = new Map(); // by id of a conversation: its answer that is being written
    this.list = h("div.messages", { role: "log", "aria-label": "Messages", "aria-live": "off" });
    this.scroller = h("div.scroller", { scroll: () => this.#noteScroll() }, this.list);
    this.input = h("textarea", { rows: "1", placeholder: "Ask anything", "aria-label": "Message",
      keydown: (event) => this.#onInputKey(event), input: () => this.#fitInput() });
    this.send = h("button.send", { type: "button", click: () => this.#sendOrStop() });
    this.models = h("select.model", { "aria-label": "Model", change: () => this.#chooseModel() });
    this.settings = new Settings(() => this.store.all.has(this.conversation.id) && this.store.save(this.conversation));
    this.status = h("p.sr", { role: "status" });
    section.append(
      h("header.bar", {}, this.models, h("span.grow"), this.settings.button),
      this.settings.panel,
      this.scroller,
      h("div.composer", {}, h("div.box", {}, this.input, this.send),
        h("p.hint", {}, "Conversations stay in this browser. Press ? for shortcuts.")),
      this.status,
    );
    this.conversations = new Conversations(document.getElementById("conversations"), store, {
      open: (conversation) => this.open(conversation),
      deleted: (id) => { this.runs.get(id)?.stop(); if (id === this.conversation.id) this.open(null); },
      begin: () => this.open(null),
    });
    this.follows = true;
    this.open(null);
    addEventListener("keydown", (event) => this.#onKey(event));
  }

  show() {
    this.conversations.show(true);
    if (!matchMedia("(pointer: coarse)").matches) this.input.focus();
  }

  hide() {
    this.conversations.show(false);
    closeAlternatives();
  }

  /** Read the names of the server's models. */
  async loadModels() {
    try {
      const { data } = await json("v1/models");
      this.models.replaceChildren(...data.map(({ id, parent, shares }) =>
        h("option", { value: id }, parent ? `${id} → ${parent}` : shares ? `${id} (split)` : id)));
    } catch (error) {
      this.#fail(error);
    }
    this.#showModel();
  }

  /** Show a conversation; null begins a new one with the settings of the one before. */
  open(conversation) {
    const { model, system, sampling } = this.conversation ?? {};
    this.conversation = conversation ?? this.store.create(model ? { model, system, sampling: { ...sampling } } : {});
    this.conversations.mark(this.conversation.id);
    this.settings.show(this.conversation);
    this.#showModel();
    closeAlternatives();
    this.views = [];
    this.list.replaceChildren();
    this.conversation.messages.forEach((message) => this.#addView(message));
    this.runs.get(this.conversation.id)?.attach(this.views.at(-1));
    this.#showEmpty();
    this.#showButton();
    this.#scrollToEnd(true);
    dispatchEvent(new Event("close-menu"));
    if (!matchMedia("(pointer: coarse)").matches) this.input.focus();
  }

  #showEmpty() {
    this.list.querySelector(".empty")?.remove();
    if (this.conversation.messages.length) return;
    const suggest = (text) => h("button", { type: "button", click: () => { this.input.value = text; this.#sendOrStop(); } }, text);
    this.list.append(h("div.empty", {}, h("h1", {}, "What would you like to know?"), ...SUGGESTIONS.map(suggest)));
  }

  #showModel() {
    const { model } = this.conversation;
    if (model && [...this.models.options].some((option) => option.value === model)) this.models.value = model;
  }

  #chooseModel() {
    this.conversation.model = this.models.value;
    if (this.conversation.messages.length) this.store.save(this.conversation);
  }

  // Sending

  #sendOrStop() {
    const run = this.runs.get(this.conversation.id);
    if (run) return run.stop();
    const text = this.input.value.trim();
    if (!text) return this.input.focus();
    this.input.value = "";
    this.#fitInput();
    this.#append({ role: "user", content: text });
    this.#answer();
  }

  #append(message) {
    this.conversation.messages.push(message);
    this.conversation.title ||= message.content.slice(0, 60).replace(/\s+/g, " ");
    return this.#addView(message);
  }

  /** Let the model write the next message. */
  async #answer() {
    const { conversation } = this;
    conversation.model = this.models.value || null;
    conversation.updated = Date.now();
    this.list.querySelector(".empty")?.remove();
    const message = { role: "assistant", content: "", model: conversation.model };
    const body = { model: conversation.model, messages: this.#context(), ...samplingBody(conversation.sampling) };
    if (conversation.sampling.probabilities !== false) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
    const view = this.#append(message);
    const run = new Run(message, view, () => this.conversation === conversation && this.#scrollToEnd());
    this.runs.set(conversation.id, run);
    this.conversations.mark(conversation.id);
    this.#showButton();
    this.#scrollToEnd(true);
    this.store.save(conversation).then(() => this.conversations.draw());
    await run.read(body);
    this.runs.delete(conversation.id);
    conversation.updated = Date.now();
    if (this.store.all.has(conversation.id)) await this.store.save(conversation);
    this.conversations.draw();
    if (this.conversation !== conversation) return;
    run.view.draw();
    this.#showButton();
    this.#scrollToEnd();
    this.status.textContent = message.error ? `Error: ${message.error}` : `The answer is complete. ${message.content}`;
  }

  /** Return the messages that the model gets. */
  #context() {
    const { system, messages } = this.conversation;
    const said = messages.filter(({ error, content }) => !error || content).map(({ role, content }) => ({ role, content }));
    return system?.trim() ? [{ role: "system", content: system }, ...said] : said;
  }

  #retry(message) {
    this.#cutFrom(this.conversation.messages.indexOf(message));
    this.#answer();
  }

  #edit(message, text) {
    const at = this.conversation.messages.indexOf(message);
    this.#cutFrom(at);
    if (at === 0) this.conversation.title = "";
    this.#append({ role: "user", content: text });
    this.#answer();
  }

  /** Remove the messages from position `at` on. */
  #cutFrom(at) {
    this.runs.get(this.conversation.id)?.stop();
    this.conversation.messages.splice(at);
    for (const view of this.views.splice(at)) view.element.remove();
  }

  #addView(message) {
    const view = new MessageView(message, {
      retry: () => this.#whenIdle(() => this.#retry(message)),
      edit: (text) => this.#whenIdle(() => this.#edit(message, text)),
    });
    this.views.push(view);
    this.list.append(view.element);
    return view;
  }

  async #whenIdle(action) {
    const run = this.runs.get(this.conversation.id);
    run?.stop();
    await run?.ended;
    action();
  }

  #fail(error) {
    if (error.name !== "AbortError") toast(error.message);
  }

  // Keyboard, sizes, scrolling

  #onInputKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!this.runs.has(this.conversation.id)) this.#sendOrStop();
    } else if (event.key === "ArrowUp" && !this.input.value) {
      const last = this.views.findLast((view) => view.message.role === "user");
      if (last) event.preventDefault();
      last?.beginEdit();
    }
  }

  #onKey(event) {
    if (document.body.dataset.view !== "chat" || document.querySelector("dialog[open]")) return;
    const typing = event.target.matches?.("input, textarea, select");
    if (event.key === "Escape" && !closeAlternatives() && !this.settings.close()) this.runs.get(this.conversation.id)?.stop();
    else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
      event.preventDefault();
      this.conversations.focusSearch();
    } else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      this.open(null);
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      this.input.focus();
    }
  }

  #fitInput() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight, innerHeight * 0.4)}px`;
  }

  #showButton() {
    const runs = this.runs.has(this.conversation.id);
    this.send.replaceChildren(icon(runs ? "stop" : "send"));
    this.send.setAttribute("aria-label", runs ? "Stop" : "Send");
    this.send.title = runs ? "Stop (Esc)" : "Send (Enter)";
    this.send.classList.toggle("stop", runs);
  }

  #noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR;
  }

  #scrollToEnd(always = false) {
    if (always || this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

/** An answer that is being written. What arrives is drawn once per frame. */
class Run {
  constructor(message, view, drawn) {
    this.message = message;
    this.drawn = drawn;
    this.controller = new AbortController();
    this.frame = 0;
    this.ended = new Promise((resolve) => { this.end = resolve; });
    this.attach(view);
  }

  /** Draw into another view from now on. */
  attach(view) {
    this.view = view;
    view.grow();
  }

  stop() {
    this.controller.abort();
  }

  async read(body) {
    const { message } = this;
    const began = performance.now();
    let first = 0;
    try {
      for await (const chunk of streamChat(body, this.controller.signal)) {
        const [choice] = chunk.choices;
        if (chunk.usage) message.usage = { prompt: chunk.usage.prompt_tokens, answer: chunk.usage.completion_tokens };
        if (!choice) continue;
        const { content, reasoning_content: reasoning } = choice.delta;
        if (content || reasoning) first ||= performance.now();
        if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
        if (content) message.content += content;
        if (choice.logprobs?.content && !reasoning) (message.tokens ??= []).push(...tokensOf(choice.logprobs.content));
        if (choice.finish_reason) message.finish = choice.finish_reason;
        this.frame ||= requestAnimationFrame(() => this.#draw());
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = error instanceof ApiError ? error.message : "The connection to the server was lost.";
    }
    cancelAnimationFrame(this.frame);
    if (first) message.times = { first: first - began, rest: performance.now() - first };
    this.end();
  }

  #draw() {
    this.frame = 0;
    this.view.update();
    this.drawn();
  }
}

/** One message of the list. */
class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = h(`article.message.${message.role}`, { "aria-label": message.role === "user" ? "You" : "Answer" });
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
    return [h("div.text", {}, content), h("div.actions", {}, iconButton("edit", "Edit", () => this.beginEdit()),
      iconButton("copy", "Copy", () => copyText(content)))];
  }

  #answer() {
    const { message } = this;
    this.body = h("div.markdown", { click: (event) => this.#clicked(event) }, render(message.content));
    return [this.#reasoning(), this.body, this.#error(), this.#actions()].filter(Boolean);
  }

  #reasoning() {
    const { reasoning } = this.message;
    return reasoning ? h("details.reasoning", {}, h("summary", {}, "Reasoning"), h("div.markdown", {}, render(reasoning))) : null;
  }

  #error() {
    const { error } = this.message;
    return error ? h("p.error", { role: "alert" }, error) : null;
  }

  #actions() {
    const { message } = this;
    const has = message.tokens?.length > 0;
    const toggle = has && iconButton("bars", "Probabilities of the tokens", () => this.#toggleTokens(), { "aria-pressed": "false" });
    this.toggle = toggle;
    return h("div.actions", {}, iconButton("copy", "Copy", () => copyText(message.content)),
      iconButton("retry", "Retry", () => this.actions.retry()), toggle, h("span.facts", {}, facts(message)));
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
    const box = (i) => { range.setStart(caret.node, i); range.setEnd(caret.node, i + 1); return range.getBoundingClientRect(); };
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
    const input = h("textarea", { rows: String(Math.min(12, content.split("\n").length + 1)), "aria-label": "Edit the message" });
    const send = () => input.value.trim() && this.actions.edit(input.value.trim());
    const cancel = () => this.draw();
    input.value = content;
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    });
    this.element.replaceChildren(h("div.edit", {}, input, h("div.actions", {},
      h("button", { type: "button", click: cancel }, "Cancel"),
      h("button.primary", { type: "button", click: send }, "Send"))));
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
  if (usage && times && usage.answer > 1) parts.push(`${((usage.answer - 1) / (times.rest / 1000)).toFixed(0)} tokens/s`);
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut at the limit of tokens");
  return parts.filter(Boolean).join(" · ");
}
