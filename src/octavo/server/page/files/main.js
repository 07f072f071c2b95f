/** The page: views, theme, keys of the server, and shortcuts. Each view is a module that is loaded when it is shown. */

import { getKey, onKeyNeeded, setKey } from "./api.js";
import { dialog, h, toast } from "./dom.js";
import { prefer, preference } from "./store.js";

const VIEWS = {
  chat: () => import("./chat.js"),
  live: () => Promise.all([import("./live.js"), style("live.css")]).then(([module]) => module),
  models: () => Promise.all([import("./models.js"), style("live.css")]).then(([module]) => module),
};
const SHORTCUTS = [
  ["Enter", "Send the message"],
  ["Shift + Enter", "Begin a new line"],
  ["Esc", "Stop the answer"],
  ["↑", "Edit the last message, in an empty box"],
  ["Ctrl + K", "Search the conversations"],
  ["Ctrl + Shift + O", "Begin a new conversation"],
  ["Alt + 1, 2, 3", "Show chat, live view, models"],
  ["/", "Go to the message box"],
  ["?", "Show this list"],
];
const KINDS = {
  client: ["API key", "This server needs an API key."],
  admin: ["Admin key", "This view shows all tenants, so it needs the server's admin key."],
};

const views = new Map(); // by name: what the module's `start` has returned
let shown = null;

async function show(name) {
  name = name in VIEWS ? name : "chat";
  if (shown === name) return;
  if (shown) views.get(shown)?.hide?.();
  shown = name;
  closeMenu();
  for (const each of Object.keys(VIEWS)) document.getElementById(each).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = name;
  document.title = name === "chat" ? "Octavo" : `${name[0].toUpperCase()}${name.slice(1)} · Octavo`;
  if (!views.has(name)) {
    const module = await VIEWS[name]();
    views.set(name, await module.start(document.getElementById(name)));
  }
  if (shown === name) views.get(name).show?.();
}

const styles = new Map(); // by name: the promise that it is loaded

function style(name) {
  if (!styles.has(name))
    styles.set(
      name,
      new Promise((load, error) => {
        document.head.append(h("link", { rel: "stylesheet", href: `page/${name}`, load, error }));
      }),
    );
  return styles.get(name);
}

// Theme: as the system has it, until the switch is used.

const dark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : dark.matches;
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  dispatchEvent(new Event("themechange"));
}

function switchTheme() {
  const wanted = isDark() ? "light" : "dark";
  const theme = (wanted === "dark") === dark.matches ? null : wanted; // null: as the system has it
  prefer("theme", theme);
  setTheme(theme);
}

// Keys of the server

async function askForKey(kind, message) {
  const [title, reason] = KINDS[kind];
  const had = Boolean(getKey(kind));
  const entered = await dialog(title, (close) => [keyForm(kind, had ? message : reason, close)]);
  if (!entered) return false;
  setKey(kind, entered.key, entered.remember);
  return true;
}

function keyForm(kind, text, close) {
  const input = h("input", {
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    autofocus: true,
    "aria-label": KINDS[kind][0],
    name: "key",
  });
  const remember = h("input", { type: "checkbox", name: "remember" });
  const submit = (event) => {
    event.preventDefault();
    if (input.value.trim()) close({ key: input.value.trim(), remember: remember.checked });
  };
  return h(
    "form",
    { submit },
    h("p", {}, text),
    input,
    h("label.check", {}, remember, "Remember it in this browser. Otherwise it is forgotten when the tab is closed."),
    h("div.actions", {}, h("button.primary", { type: "submit" }, "Continue")),
  );
}

function showKeys() {
  const row = (kind, close) => {
    const state = h("span.muted", {}, getKey(kind) ? "is set" : "is not set");
    const change = async () => {
      close();
      if (await askForKey(kind, KINDS[kind][1])) location.reload();
    };
    const forget = () => {
      setKey(kind, "");
      state.textContent = "is not set";
      toast(`${KINDS[kind][0]} forgotten`);
    };
    return h(
      "div.row",
      {},
      h("b", {}, KINDS[kind][0]),
      state,
      h("button", { type: "button", click: change }, "Set"),
      h("button", { type: "button", click: forget }, "Forget"),
    );
  };
  dialog("Keys", (close) => [
    h("p.muted", {}, "They are kept in this browser only, and sent with each request to this server."),
    row("client", close),
    row("admin", close),
  ]);
}

function showHelp() {
  if (document.querySelector("dialog")) return;
  dialog("Keyboard", () => [
    h(
      "dl.keys",
      {},
      ...SHORTCUTS.flatMap(([keys, what]) => [
        h("dt", {}, ...keys.split(" + ").flatMap((key, i) => [i ? " + " : null, h("kbd", {}, key)])),
        h("dd", {}, what),
      ]),
    ),
  ]);
}

// The menu, on phones

function closeMenu() {
  document.body.classList.remove("menu");
  document.getElementById("menu").setAttribute("aria-expanded", "false");
}

function toggleMenu() {
  const open = document.body.classList.toggle("menu");
  document.getElementById("menu").setAttribute("aria-expanded", String(open));
}

function isTyping(target) {
  return target.matches?.("input, textarea, select, [contenteditable]");
}

function onKey(event) {
  if (event.altKey && !event.ctrlKey && "123".includes(event.key) && event.key) {
    location.hash = Object.keys(VIEWS)[event.key - 1];
    event.preventDefault();
  } else if (event.key === "?" && !isTyping(event.target)) showHelp();
  else if (event.key === "Escape") closeMenu();
}

onKeyNeeded(askForKey);
setTheme(preference("theme", null));
dark.addEventListener("change", () => dispatchEvent(new Event("themechange")));
document.getElementById("theme").addEventListener("click", switchTheme);
document.getElementById("key").addEventListener("click", showKeys);
document.getElementById("help").addEventListener("click", showHelp);
document.getElementById("menu").addEventListener("click", toggleMenu);
document.getElementById("shade").addEventListener("click", closeMenu);
addEventListener("close-menu", closeMenu);
addEventListener("keydown", onKey);
addEventListener("hashchange", () => show(location.hash.slice(1)));
show(location.hash.slice(1));
