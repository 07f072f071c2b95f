/** The settings of a conversation: system prompt and sampling. What is left empty is as the model recommends. */

import { h, icon } from "./dom.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.1,
    what: "0 always takes the likeliest token.",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0,
    max: 1,
    step: 0.05,
    what: "The likeliest tokens that have this probability together.",
  },
  { name: "top_k", label: "Top k", min: 0, step: 1, what: "The so many likeliest tokens; 0: all." },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, what: "Length of an answer." },
  { name: "seed", label: "Seed", min: 0, step: 1, what: "The same seed gives the same answer." },
];

/** Return the sampling parameters for the body of a request. */
export function samplingBody(sampling) {
  return Object.fromEntries(
    FIELDS.map(({ name }) => [name, sampling[name]]).filter(([, value]) => value !== undefined),
  );
}

/** The panel. `changed` is called after each change. */
export class Settings {
  constructor(changed) {
    this.changed = changed;
    this.button = h(
      "button.quiet",
      { type: "button", "aria-expanded": "false", "aria-controls": "settings", click: () => this.#toggle() },
      icon("tune"),
      h("span", {}, "Settings"),
    );
    this.system = h("textarea", {
      rows: "3",
      placeholder: "You are a helpful assistant.",
      id: "system",
      input: () => {
        this.conversation.system = this.system.value;
        this.changed();
      },
    });
    this.inputs = new Map(FIELDS.map((field) => [field.name, this.#input(field)]));
    this.probabilities = h("input", {
      type: "checkbox",
      change: () => this.#set("probabilities", this.probabilities.checked),
    });
    this.panel = h(
      "div.settings",
      { id: "settings", hidden: true, role: "region", "aria-label": "Settings" },
      h("label.wide", { for: "system" }, h("b", {}, "System prompt"), this.system),
      ...FIELDS.map((field) => h("label", { title: field.what }, h("b", {}, field.label), this.inputs.get(field.name))),
      h(
        "label.check.wide",
        {},
        this.probabilities,
        "Get the probabilities of tokens: click a word of an answer to see what else might have been there.",
      ),
    );
  }

  /** Show the settings of a conversation, and change those from now on. */
  show(conversation) {
    this.conversation = conversation;
    this.system.value = conversation.system ?? "";
    for (const [name, input] of this.inputs) input.value = conversation.sampling[name] ?? "";
    this.probabilities.checked = conversation.sampling.probabilities !== false;
  }

  /** Close the panel. Return whether it was open. */
  close() {
    if (this.panel.hidden) return false;
    this.#toggle();
    return true;
  }

  #toggle() {
    this.panel.hidden = !this.panel.hidden;
    this.button.setAttribute("aria-expanded", String(!this.panel.hidden));
    (this.panel.hidden ? this.button : this.system).focus();
  }

  #input({ name, min, max, step }) {
    return h("input", {
      type: "number",
      name,
      min: String(min),
      max: max === undefined ? null : String(max),
      step: String(step),
      placeholder: "default",
      input: (event) => {
        const { value, validity } = event.target;
        const isWrong = validity.rangeUnderflow || validity.rangeOverflow || validity.badInput;
        event.target.setAttribute("aria-invalid", String(isWrong));
        if (!isWrong) this.#set(name, value === "" ? undefined : Number(value));
      },
    });
  }

  #set(name, value) {
    const { sampling } = this.conversation;
    if (value === undefined) delete sampling[name];
    else sampling[name] = value;
    this.changed();
  }
}
