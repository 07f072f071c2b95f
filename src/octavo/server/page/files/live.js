/** The live view: speed, latency, queue, tenants, engines, and the map of KV pages, from GET /stats/live. */

import { events, request } from "./api.js";
import { Chart, percentile } from "./charts.js";
import { h } from "./dom.js";
import { colorOf, countStates, PageMap, STATES } from "./page_map.js";

const WINDOW = 15; // seconds over which latencies are taken
const MOST_TENANTS = 12;
const STACK = [3, 2, 4, 5, 6, 1, 0]; // states of the page chart, from below

/** Start the view in a section of the page. */
export async function start(section) {
  return new LiveView(section);
}

class LiveView {
  constructor(section) {
    this.before = []; // events of the last seconds
    this.maps = new Map(); // by engine
    this.model = null;
    this.isChosen = false; // by the user
    this.state = h("span.state", { role: "status" });
    this.models = h("select.model", { "aria-label": "Model", change: () => this.#userChooses() });
    this.tiles = {
      output: tile("Output", "tokens/s", lines("output"), number),
      requests: tile("Requests", "running", lines("running", "waiting"), number),
      first: tile("First token", "median", lines("median", "95 %"), seconds),
      between: tile("Between tokens", "median", lines("median", "95 %"), seconds),
      prompt: tile("Prompts", "tokens/s", lines("computed", "from the cache"), number),
      steps: tile("Steps", "per second", lines("steps/s"), number),
    };
    this.mapCards = h("div.maps");
    this.engines = h("tbody");
    this.tenants = h("tbody");
    this.notice = h("div.notice", { hidden: true });
    this.content = h(
      "div.content",
      {},
      h("div.tiles", {}, ...Object.values(this.tiles).map((each) => each.element)),
      this.mapCards,
      table(
        "Engines",
        ["Engine", "State", "Running", "Waiting", "Tokens/s", "Step", "KV in use", "From cache", "Preempted"],
        this.engines,
      ),
      table(
        "Tenants",
        ["Tenant", "Requests/s", "Output/s", "From cache", "First token, p50", "p95", "Requests"],
        this.tenants,
      ),
    );
    section.append(
      h("header.bar", {}, this.models, h("span.grow"), this.state),
      h("div.scroller", {}, this.notice, this.content),
    );
    document.addEventListener("visibilitychange", () => this.#follow());
  }

  show() {
    this.isShown = true;
    this.#follow();
  }

  hide() {
    this.isShown = false;
    this.#follow();
  }

  /** Read events while the view can be seen. */
  async #follow() {
    const wanted = this.isShown && document.visibilityState === "visible";
    if (wanted === Boolean(this.controller)) return;
    if (!wanted) {
      this.controller.abort();
      this.controller = null;
      return;
    }
    const controller = (this.controller = new AbortController());
    let wait = 500;
    while (this.controller === controller) {
      try {
        this.#say("connecting");
        const model = this.model === null ? "" : `&model=${encodeURIComponent(this.model)}`;
        const response = await request(`stats/live?follow=true${model}`, {
          signal: controller.signal,
          kind: "admin",
        });
        this.notice.hidden = true;
        this.content.hidden = false;
        for await (const { data } of events(response)) {
          wait = 500;
          this.#take(JSON.parse(data));
        }
      } catch (error) {
        if (error.name === "AbortError") return;
        if ([401, 403].includes(error.status)) return this.#refuse(error);
        if (error.status === 404) this.model = null;
      }
      this.#say("reconnecting");
      await new Promise((resolve) => {
        setTimeout(resolve, wait);
      });
      wait = Math.min(2 * wait, 8000);
    }
  }

  #userChooses() {
    this.isChosen = true;
    this.#chooseModel(this.models.value);
  }

  #chooseModel(model) {
    this.model = model;
    this.before = [];
    this.maps.forEach((each) => each.close());
    this.maps.clear();
    this.mapCards.replaceChildren();
    this.controller?.abort();
    this.controller = null;
    this.#follow();
  }

  #refuse(error) {
    this.controller = null;
    this.#say("");
    const again = h("button.primary", { type: "button", click: () => this.#follow() }, "Enter the admin key");
    this.notice.replaceChildren(
      h(
        "p",
        {},
        error.status === 403
          ? "The live view shows all tenants, so on a server with API keys it needs an admin key. " +
              "Start the server with --admin-key to see it."
          : error.message,
      ),
      ...(error.status === 403 ? [] : [h("p", {}, again)]),
    );
    this.notice.hidden = false;
    this.content.hidden = true;
  }

  #say(state) {
    this.state.textContent = state;
    this.state.dataset.state = state;
  }

  #take(event) {
    if (event.type === "begin") this.bounds = event.bounds;
    else if (event.type === "stats") this.#takeStats(event);
    else this.#takePages(event);
  }

  // Statistics

  #takeStats(event) {
    this.#say("live");
    this.#listModels(event.models); // may choose another model, which forgets the events before
    this.before.push(event);
    while (this.before[0].time < event.time - WINDOW) this.before.shift();
    this.maps.forEach((each) => each.note(event.time));
    const now = this.#modelOf(event);
    const earlier = this.before.slice(0, -1).findLast((each) => this.#modelOf(each)?.stats.engine) ?? null;
    if (!now?.stats.engine) return;
    this.#drawTiles(event, now, earlier);
    this.#drawEngines(event, now, earlier);
    this.#drawTenants(event, now);
  }

  #modelOf(event) {
    return event?.models.find(({ stats }) => stats.name === this.model) ?? null;
  }

  #listModels(models) {
    const names = models.map(({ stats }) => stats.name);
    const current = models.find(({ stats }) => stats.name === this.model);
    if (!current || (!this.isChosen && current.stats.state === "unloaded")) {
      const { name } = (models.find(({ stats }) => stats.engine) ?? current ?? models[0]).stats;
      if (this.model === null && name === names[0]) this.model = name; // its pages are sent already
      else if (name !== this.model) this.#chooseModel(name);
    }
    if ([...this.models.options].map((each) => each.value).join("\n") !== names.join("\n"))
      this.models.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    this.models.value = this.model;
  }

  #drawTiles(event, now, earlier) {
    const { engine } = now.stats;
    const was = this.#modelOf(earlier)?.stats.engine;
    const rate = rates(engine, was, event.time - (earlier?.time ?? 0));
    const { output, requests, first, between, prompt, steps } = this.tiles;
    const cached = rate("cached_tokens");
    const all = rate("prompt_tokens");
    output.show(event.time, [rate("tokens_generated")], `${number(engine.tokens_generated)} so far`);
    requests.show(event.time, [engine.running, engine.waiting], `${number(engine.waiting)} waiting`);
    first.show(event.time, this.#latencies("first_token"), (p) => `95 %: ${seconds(p)}`);
    between.show(event.time, this.#latencies("inter_token_latency_seconds"), (p) => `95 %: ${seconds(p)}`);
    prompt.show(
      event.time,
      [all === null ? null : all - cached, cached],
      engine.prompt_tokens ? `${percent(engine.cached_tokens / engine.prompt_tokens)} from the cache` : "",
    );
    const per = rate("steps") ? (1000 * rate("step_seconds")) / rate("steps") : null;
    steps.show(event.time, [rate("steps")], per === null ? "idle" : `${per.toFixed(1)} ms each`);
  }

  /** Return median and 95th percentile of the last seconds. */
  #latencies(name) {
    const counts = this.#grown((model) => model.latencies[name]);
    return [0.5, 0.95].map((part) => percentile(this.bounds[name], counts, part));
  }

  /** Return by how much the counts of buckets have grown in the last seconds. */
  #grown(read) {
    const [then, now] = [this.before[0], this.before.at(-1)].map((event) => this.#modelOf(event));
    const after = (now && read(now)) ?? [];
    const before = (then && then !== now && read(then)) || [];
    return after.map((count, i) => Math.max(0, count - (before[i] ?? 0)));
  }

  #drawEngines(event, now, earlier) {
    this.engines.replaceChildren(
      ...now.stats.replicas.map((replica) => {
        const { engine } = replica;
        const was = this.#modelOf(earlier)?.stats.replicas.find((each) => each.pid === replica.pid)?.engine;
        const state = replica.is_ready ? "ready" : replica.status;
        if (!engine) return row([replica.name, state, ...Array(7).fill("–")]);
        const rate = rates(engine, was, event.time - (earlier?.time ?? 0));
        const used = 1 - (engine.free_pages + engine.cached_pages) / engine.num_pages;
        return row([
          replica.name,
          state,
          number(engine.running),
          number(engine.waiting),
          number(rate("tokens_generated")),
          rate("steps") ? `${((1000 * rate("step_seconds")) / rate("steps")).toFixed(1)} ms` : "–",
          percent(used),
          engine.prompt_tokens ? percent(engine.cached_tokens / engine.prompt_tokens) : "–",
          number(engine.preemptions),
        ]);
      }),
    );
  }

  #drawTenants(event, now) {
    const then = this.before[0];
    const span = event.time - then.time;
    const before = new Map((this.#modelOf(then)?.tenants ?? []).map((each) => [each.name, each]));
    const rows = now.tenants
      .map((each) => {
        const was = before.get(each.name) ?? each;
        const counts = each.first_token.map((count, i) => count - (was.first_token[i] ?? 0));
        const per = (field) => (span ? (each[field] - was[field]) / span : null);
        return { each, output: per("generated_tokens"), requests: per("requests"), counts };
      })
      .filter(({ each }) => each.name || each.requests || each.generated_tokens)
      .sort((a, b) => b.output - a.output || b.each.generated_tokens - a.each.generated_tokens);
    this.tenants.replaceChildren(
      ...rows
        .slice(0, MOST_TENANTS)
        .map(({ each, output, requests, counts }) =>
          row([
            each.name || "no tenant",
            requests === null ? "–" : requests.toFixed(1),
            number(output),
            each.prompt_tokens ? percent(each.cached_tokens / each.prompt_tokens) : "–",
            seconds(percentile(this.bounds.first_token, counts, 0.5)),
            seconds(percentile(this.bounds.first_token, counts, 0.95)),
            number(each.requests),
          ]),
        ),
    );
    if (rows.length > MOST_TENANTS)
      this.tenants.append(row([`and ${rows.length - MOST_TENANTS} others`, ...Array(6).fill("")]));
    if (!rows.length) this.tenants.append(row(["No requests yet", ...Array(6).fill("")]));
  }

  // Pages

  #takePages({ model, engine, pages }) {
    const states = Uint8Array.from(atob(pages), (each) => each.charCodeAt(0));
    const id = `${model} ${engine}`;
    if (!this.maps.has(id)) {
      const card = new MapCard(engine === "the engine" ? "KV pages" : `KV pages of ${engine}`);
      this.maps.set(id, card);
      this.mapCards.append(card.element);
    }
    this.maps.get(id).update(states);
  }
}

/** The map of one engine's pages, with legend and history. */
class MapCard {
  constructor(title) {
    this.map = new PageMap(title);
    this.counts = STATES.map(() => h("span.count"));
    this.total = h("span.muted");
    this.chart = new Chart({
      label: `${title} over time`,
      stacked: true,
      most: 1,
      format: percent,
      series: STACK.map((state) => ({ name: STATES[state].name, color: colorOf(state) })),
    });
    this.buttons = STATES.map((state, i) => this.#entry(state, i));
    this.element = h(
      "section.card",
      { "aria-label": title },
      h("header", {}, h("h2", {}, title), this.total),
      h("div.legend", { role: "group", "aria-label": "Show one state alone" }, ...this.buttons),
      this.map.element,
      h("div.history", {}, this.chart.element),
    );
  }

  close() {
    this.map.close();
    this.chart.close();
  }

  update(pages) {
    this.map.update(pages);
    this.latest = countStates(pages);
    const used = pages.length - this.latest[0] - this.latest[1];
    this.latest.forEach((count, state) => {
      this.counts[state].textContent = number(count);
    });
    this.total.textContent = `${number(used)} of ${number(pages.length)} in use`;
    this.map.canvas.setAttribute(
      "aria-label",
      `${this.map.label}: ` +
        STATES.map(({ name }, i) => `${name} ${this.latest[i]}`).join(", ") +
        ". Arrow keys show single pages.",
    );
  }

  /** Add the latest states to the history. */
  note(time) {
    const all = this.latest.reduce((sum, each) => sum + each, 0);
    this.chart.add(
      time,
      STACK.map((state) => this.latest[state] / all),
    );
  }

  #entry({ name, what }, i) {
    const swatch = h("span.swatch");
    swatch.style.background = colorOf(i);
    return h(
      "button",
      { type: "button", "aria-pressed": "false", title: `Page that is ${what}`, click: () => this.#choose(i) },
      swatch,
      name,
      this.counts[i],
    );
  }

  #choose(state) {
    const chosen = this.map.chosen === state ? null : state;
    this.map.choose(chosen);
    this.buttons.forEach((each, i) => each.setAttribute("aria-pressed", String(i === chosen)));
  }
}

/** Return the series of a chart: a line, and perhaps a second one, dashed. */
function lines(first, second) {
  const series = [{ name: first, color: "var(--accent)" }];
  if (second) series.push({ name: second, color: "var(--second)", dash: true });
  return series;
}

function tile(title, unit, series, format) {
  const value = h("b.value", {}, "–");
  const note = h("p.note");
  const chart = new Chart({ label: title, series, format });
  const element = h(
    "section.card.tile",
    { "aria-label": title },
    h("h2", {}, title),
    h("p", {}, value, " ", h("span.muted", {}, unit)),
    note,
    chart.element,
  );
  /** Show values, and a note or what makes one of the second value. */
  const show = (time, values, text) => {
    value.textContent = values[0] === null ? "–" : format(values[0]);
    note.textContent = typeof text === "string" ? text : values[1] === null ? "" : text(values[1]);
    chart.add(time, values);
  };
  return { element, show };
}

function table(title, heads, body) {
  return h(
    "section.card",
    { "aria-label": title },
    h("header", {}, h("h2", {}, title)),
    h(
      "div.wide",
      {},
      h(
        "table.numbers",
        {},
        h("thead", {}, h("tr", {}, ...heads.map((each) => h("th", { scope: "col" }, each)))),
        body,
      ),
    ),
  );
}

function row(values) {
  return h("tr", {}, ...values.map((value, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, value)));
}

/** Return a function that tells by how much per second a counter has grown; null if that is not known. */
function rates(now, was, span) {
  const known = was && span > 0 && was.steps <= now.steps;
  return (counter) => (known ? (now[counter] - was[counter]) / span : null);
}

function number(value) {
  return value === null ? "–" : Math.round(value).toLocaleString("en");
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(value < 10 ? 2 : 0)} s`;
}

function percent(value) {
  return `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
}
