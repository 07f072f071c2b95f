/** The chat: one conversation, its settings and its messages. */

import { Answer } from "./answer.js";
import { json } from "./api.js";
import { Conversations } from "./conversations.js";
import { h, icon, iconButton, toast } from "./dom.js";
import { MessageView } from "./message.js";
import { closeAlternatives } from "./probabilities.js";
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
    this.input = h("textarea", {
      rows: "1",
      placeholder: "Ask anything",
      "aria-label": "Message",
      keydown: (event) => this.#onInputKey(event),
      input: () => this.#fitInput(),
    });
    this.send = h("button.send", { type: "button", click: () => this.#sendOrStop() });
    this.models = h("select.model", { "aria-label": "Model", change: () => this.#chooseModel() });
    this.settings = new Settings(() => this.store.all.has(this.conversation.id) && this.store.save(this.conversation));
    this.status = h("p.sr", { role: "status" });
    section.append(
      h("header.bar", {}, this.models, h("span.grow"), this.settings.button),
      this.settings.panel,
      this.scroller,
      h(
        "div.composer",
        {},
        h("div.box", {}, this.input, this.send),
        h("p.hint", {}, "Conversations stay in this browser. Press ? for shortcuts."),
      ),
      this.status,
    );
    this.conversations = new Conversations(document.getElementById("conversations"), store, {
      open: (conversation) => this.open(conversation),
      deleted: (id) => {
        this.runs.get(id)?.stop();
        if (id === this.conversation.id) this.open(null);
      },
      begin: () => this.open(null),
    });
    this.follows = true;
    this.open(null);
    addEventListener("keydown", (event) => this.#onKey(event));
    addEventListener("resize", () => this.#fitInput());
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
      this.models.replaceChildren(
        ...data.map(({ id, parent, shares }) =>
          h("option", { value: id }, parent ? `${id} → ${parent}` : shares ? `${id} (split)` : id),
        ),
      );
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
    const suggest = (text) =>
      h(
        "button",
        {
          type: "button",
          click: () => {
            this.input.value = text;
            this.#sendOrStop();
          },
        },
        text,
      );
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
    if (conversation.sampling.probabilities !== false)
      Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
    const view = this.#append(message);
    const run = new Answer(message, view, () => this.conversation === conversation && this.#scrollToEnd());
    this.runs.set(conversation.id, run);
    this.conversations.mark(conversation.id);
    this.#showButton();
    this.#scrollToEnd(true);
    this.store.save(conversation).then(() => this.conversations.draw());
    await run.read(body);
    if (this.runs.get(conversation.id) !== run) return; // another answer has taken its place
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
    const said = messages
      .filter(({ error, content }) => !error || content)
      .map(({ role, content }) => ({ role, content }));
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
    if (event.key === "Escape" && !closeAlternatives() && !this.settings.close())
      this.runs.get(this.conversation.id)?.stop();
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
