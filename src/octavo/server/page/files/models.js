/** The models of the server: load, unload, swap and scale them with the admin key. */

import { json, request } from "./api.js";
import { confirm, dialog, h, icon, toast } from "./dom.js";

const PATH = "v1/admin/models";
const PERIOD = 2000; // ms between two looks at the models
const DONE = { load: "loaded", unload: "unloaded", swap: "swapped", scale: "scaled" };
const STATES = { loaded: "ready", loading: "busy", draining: "busy", failed: "bad", unloaded: "off" };

/** Start the view in a section of the page. */
export async function start(section) {
  return new ModelsView(section);
}

class ModelsView {
  constructor(section) {
    this.changing = new Map(); // by name of a model: what is done with it
    this.list = h("div.models");
    this.splits = h("div.splits");
    this.notice = h("div.notice", { hidden: true });
    this.add = h("button.primary", { type: "button", click: () => this.#askToAdd() }, "Add a model");
    this.content = h("div.content", { hidden: true }, this.list, this.splits);
    section.append(
      h("header.bar", {}, h("b.title", {}, "Models"), h("span.grow"), this.add),
      h("div.scroller", {}, this.notice, this.content),
    );
  }

  show() {
    this.timer ??= setInterval(() => document.visibilityState === "visible" && this.#look(true), PERIOD);
    this.#look(false);
  }

  hide() {
    clearInterval(this.timer);
    this.timer = null;
  }

  async #look(quiet) {
    try {
      const [{ models }, { data }] = await Promise.all([
        json(PATH, { kind: "admin", quiet }),
        json("v1/models", { quiet }),
      ]);
      this.notice.hidden = true;
      this.content.hidden = this.add.hidden = false;
      this.seen = [models, data];
      this.#draw(...this.seen);
    } catch (error) {
      if (error.status === 401 || error.status === 403) this.#refuse(error);
      else if (!quiet) toast(error.message);
    }
  }

  #refuse(error) {
    this.hide();
    const off = error.status === 403;
    this.notice.replaceChildren(
      h(
        "p",
        {},
        off
          ? "Models can be changed here if the server has an admin key: start it with --admin-key."
          : "This view needs the server's admin key.",
      ),
      ...(off
        ? []
        : [h("p", {}, h("button.primary", { type: "button", click: () => this.show() }, "Enter the admin key"))]),
    );
    this.notice.hidden = false;
    this.content.hidden = this.add.hidden = true;
  }

  #draw(models, cards) {
    const drawn = JSON.stringify([models.map(facts), cards, [...this.changing]]);
    if (drawn === this.drawn) return; // so that a button keeps the focus
    this.drawn = drawn;
    this.list.replaceChildren(...models.map((model) => this.#card(model)));
    const splits = cards.filter((card) => card.shares);
    this.splits.replaceChildren(
      ...(splits.length
        ? [h("section.card", {}, h("header", {}, h("h2", {}, "Splits")), ...splits.map(splitRow))]
        : []),
    );
  }

  #card(model) {
    const { name, state, error, aliases, policy, memory, replicas } = model;
    const busy = this.changing.get(name);
    const lines = [
      [
        "Engines",
        replicas.length ? replicas.map((each) => (each.is_ready ? "ready" : each.status)).join(", ") : "none",
      ],
      [
        "Requests",
        replicas.length ? `${sum(replicas, "running")} running, ${sum(replicas, "waiting")} waiting` : "none",
      ],
      aliases.length && ["Aliases", aliases.join(", ")],
      memory && ["Memory", size(memory)],
      model.limits && ["Longest sequence", `${model.limits.max_model_len.toLocaleString("en")} tokens`],
      ["Scheduling", policy],
    ].filter(Boolean);
    const act = (label, click, kind = "") =>
      h(`button${kind}`, { type: "button", disabled: Boolean(busy), click }, label);
    const isLoaded = replicas.length > 0;
    return h(
      "section.card.one",
      { "aria-label": name, "data-model": name },
      h(
        "header",
        {},
        h("h2", {}, name),
        h("span.chip", { "data-kind": STATES[busy ? "loading" : state] }, busy ?? state),
      ),
      error ? h("p.error", {}, error) : null,
      h("dl", {}, ...lines.flatMap(([term, text]) => [h("dt", {}, term), h("dd", {}, text)])),
      h(
        "div.actions",
        {},
        isLoaded
          ? act("Unload", () => this.#unload(name))
          : act("Load", () => this.#change({ action: "load", name }, "loading")),
        isLoaded && act("Scale", () => this.#scale(name, replicas.length)),
        isLoaded && act("Swap", () => this.#swap(name)),
      ),
    );
  }

  async #change(body, doing) {
    this.changing.set(body.name, doing);
    this.#draw(...this.seen);
    try {
      await request(PATH, { body, kind: "admin" });
      toast(`${body.name} is ${DONE[body.action]}`);
    } catch (error) {
      await dialog("The model was not changed", () => [h("p.error", {}, error.message)]);
    }
    this.changing.delete(body.name);
    this.#look(true);
  }

  async #unload(name) {
    const text = "New requests for it are refused, running ones finish, and its memory becomes free.";
    if (await confirm(`Unload ${name}?`, text, "Unload")) this.#change({ action: "unload", name }, "unloading");
  }

  async #scale(name, now) {
    const replicas = await ask(
      `Engines of ${name}`,
      "Scale",
      [["Number of engines", { type: "number", min: "1", max: "64", value: String(now), name: "replicas" }]],
      "An engine that is ended hands its requests to the others.",
    );
    if (replicas) this.#change({ action: "scale", name, replicas: Number(replicas.replicas) }, "scaling");
  }

  async #swap(name) {
    const given = await ask(
      `Swap ${name}`,
      "Swap",
      MODEL_FIELDS,
      "The new model is loaded beside the old one. Then it gets new requests, and the old one finishes its own.",
    );
    if (given) this.#change({ action: "swap", name, model: given.model, ...settingsOf(given) }, "swapping");
  }

  async #askToAdd() {
    const given = await ask(
      "Add a model",
      "Load",
      [["Name in requests", { name: "name" }], ...MODEL_FIELDS],
      "The server loads it, and then serves it under this name.",
    );
    if (given) this.#change({ action: "load", name: given.name, model: given.model, ...settingsOf(given) }, "loading");
  }
}

const MODEL_FIELDS = [
  ["Model: a directory, .gguf file, hub name or alias", { name: "model", placeholder: "Qwen/Qwen3-0.6B" }],
  [
    "Settings, such as quantization=8bit (optional)",
    { name: "settings", required: null, placeholder: "name=value name=value" },
  ],
];

/** Ask for values. Returns them by name; undefined if the dialog was dismissed. */
function ask(title, action, fields, text) {
  return dialog(title, (close) => {
    const inputs = fields.map(([label, attributes], i) => [
      label,
      h("input", { required: true, autofocus: i === 0, ...attributes }),
    ]);
    const submit = (event) => {
      event.preventDefault();
      close(Object.fromEntries(inputs.map(([, input]) => [input.name, input.value.trim()])));
    };
    return [
      h(
        "form",
        { submit },
        h("p.muted", {}, text),
        ...inputs.map(([label, input]) => h("label", {}, h("span.label", {}, label), input)),
        h("div.actions", {}, h("button.primary", { type: "submit" }, action)),
      ),
    ];
  });
}

function settingsOf({ settings }) {
  const pairs = settings
    .split(/\s+/)
    .filter(Boolean)
    .map((each) => each.split(/=(.*)/s));
  return pairs.length ? { settings: Object.fromEntries(pairs.map(([name, value]) => [name, value ?? ""])) } : {};
}

function splitRow({ id, shares }) {
  const all = Object.values(shares).reduce((total, each) => total + each, 0);
  const parts = Object.entries(shares).map(([name, share], i) => {
    const part = h(
      `span.part.n${i % 4}`,
      { title: `${name}: ${share}` },
      `${name} ${Math.round((100 * share) / all)} %`,
    );
    part.style.flexGrow = String(share);
    return part;
  });
  return h("div.split", {}, h("b", {}, icon("tune"), id), h("div.parts", {}, ...parts));
}

/** What of a model's statistics its card shows. */
function facts({ name, state, error, aliases, policy, memory, limits, replicas }) {
  return [
    name,
    state,
    error,
    aliases,
    policy,
    memory,
    limits?.max_model_len,
    replicas.map((each) => [each.status, each.is_ready, each.engine?.running, each.engine?.waiting]),
  ];
}

function sum(replicas, field) {
  return replicas.reduce((total, { engine }) => total + (engine?.[field] ?? 0), 0);
}

function size(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(0)} MiB`;
}
