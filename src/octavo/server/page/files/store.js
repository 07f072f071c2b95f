/** What the browser keeps: conversations in IndexedDB, preferences in localStorage. The server gets none of it. */

const NAME = "octavo";
const STORE = "conversations";
const SETTINGS = "octavo-settings";

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** The conversations. If the browser has no database, they are kept until the page is closed. */
export class Store {
  static async open() {
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
      return new Store(await done(opening));
    } catch {
      return new Store(null);
    }
  }

  constructor(database) {
    this.database = database;
    this.all = new Map(); // by id
  }

  /** Read all conversations. */
  async load() {
    const list = this.database ? await done(this.#transaction("readonly").getAll()) : [];
    for (const each of list) this.all.set(each.id, each);
  }

  /** Return the conversations, the latest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  /** Make a conversation. It is not kept before `save`. */
  create(settings = {}) {
    const now = Date.now();
    return {
      id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`,
      title: "",
      created: now,
      updated: now,
      model: null,
      system: "",
      sampling: {},
      ...settings,
      messages: [],
    };
  }

  /** Keep a conversation as it is now. */
  async save(conversation) {
    this.all.set(conversation.id, conversation);
    if (this.database) await done(this.#transaction("readwrite").put(conversation));
  }

  async delete(id) {
    this.all.delete(id);
    if (this.database) await done(this.#transaction("readwrite").delete(id));
  }

  async deleteAll() {
    this.all.clear();
    if (this.database) await done(this.#transaction("readwrite").clear());
  }

  #transaction(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }
}

function preferences() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {}; // somebody has changed them
  }
}

/** Return a preference. */
export function preference(name, otherwise) {
  return preferences()[name] ?? otherwise;
}

/** Keep a preference. */
export function prefer(name, value) {
  localStorage.setItem(SETTINGS, JSON.stringify({ ...preferences(), [name]: value }));
}
