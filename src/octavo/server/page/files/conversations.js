/** The list of conversations in the sidebar: search, open, rename, export, delete. */

import { confirm, dialog, h, icon, iconButton } from "./dom.js";

/** The list. `actions` are open(conversation), begin() and deleted(id). */
export class Conversations {
  constructor(element, store, actions) {
    this.element = element;
    this.store = store;
    this.actions = actions;
    this.current = null;
    this.search = h("input", {
      type: "search",
      placeholder: "Search",
      "aria-label": "Search conversations",
      input: () => this.draw(),
      keydown: (event) => this.#onSearchKey(event),
    });
    this.list = h("ul", {});
    element.append(
      h("button.new", { type: "button", click: () => this.actions.begin() }, icon("plus"), "New conversation"),
      this.search,
      this.list,
    );
    this.draw();
  }

  show(visible) {
    this.element.hidden = !visible;
  }

  /** Mark the conversation that is shown. */
  mark(id) {
    this.current = id;
    this.draw();
  }

  focusSearch() {
    document.body.classList.add("menu");
    this.search.focus();
    this.search.select();
  }

  /** Draw the list. */
  draw() {
    const wanted = this.search.value.trim().toLowerCase();
    const all = this.store.list();
    const found = wanted ? all.filter((each) => matches(each, wanted)) : all;
    this.list.replaceChildren(...found.map((each) => this.#entry(each)));
    if (!found.length) this.list.append(h("li.none", {}, all.length ? "Nothing found" : "No conversations yet"));
    if (all.length)
      this.list.append(
        h(
          "li.all",
          {},
          h("button.link", { type: "button", click: () => exportFile("octavo-conversations.json", all) }, "Export all"),
          h("button.link", { type: "button", click: () => this.#deleteAll() }, "Delete all"),
        ),
      );
  }

  #entry(conversation) {
    const isCurrent = conversation.id === this.current;
    return h(
      "li",
      { class: isCurrent ? "current" : null },
      h(
        "button.open",
        {
          type: "button",
          "aria-current": isCurrent ? "true" : null,
          title: conversation.title,
          click: () => this.actions.open(conversation),
          dblclick: () => this.#rename(conversation),
        },
        conversation.title || "Untitled",
      ),
      h(
        "span.tools",
        {},
        iconButton("edit", "Rename", () => this.#rename(conversation)),
        iconButton("export", "Export", () => exportFile(`${conversation.title || "conversation"}.json`, conversation)),
        iconButton("trash", "Delete", () => this.#delete(conversation)),
      ),
    );
  }

  async #rename(conversation) {
    const input = h("input", {
      value: conversation.title,
      "aria-label": "Title",
      autofocus: true,
      focus: () => input.select(),
      maxlength: "120",
    });
    const title = await dialog("Rename the conversation", (close) => [
      h(
        "form",
        {
          submit: (event) => {
            event.preventDefault();
            close(input.value.trim());
          },
        },
        input,
        h("div.actions", {}, h("button.primary", { type: "submit" }, "Rename")),
      ),
    ]);
    if (!title) return;
    conversation.title = title;
    await this.store.save(conversation);
    this.draw();
  }

  async #delete(conversation) {
    const text = `“${conversation.title}” cannot be restored.`;
    if (!(await confirm("Delete the conversation?", text, "Delete"))) return;
    await this.store.delete(conversation.id);
    this.actions.deleted(conversation.id);
    this.draw();
  }

  async #deleteAll() {
    if (
      !(await confirm(
        "Delete all conversations?",
        "They are only in this browser, and cannot be restored.",
        "Delete all",
      ))
    )
      return;
    const ids = this.store.list().map((each) => each.id);
    await this.store.deleteAll();
    ids.forEach((id) => this.actions.deleted(id));
    this.draw();
  }

  #onSearchKey(event) {
    if (event.key === "Escape") {
      event.stopPropagation();
      this.search.value = "";
      this.draw();
      this.search.blur();
    } else if (event.key === "Enter") this.list.querySelector("button.open")?.click();
    else if (event.key === "ArrowDown") this.list.querySelector("button.open")?.focus();
  }
}

function matches({ title, messages }, wanted) {
  return title.toLowerCase().includes(wanted) || messages.some(({ content }) => content.toLowerCase().includes(wanted));
}

function exportFile(name, content) {
  const address = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  h("a", { href: address, download: name.replace(/[^\p{L}\p{N}. _-]+/gu, "_") }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
